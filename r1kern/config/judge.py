"""`r1kern judge`."""

from __future__ import annotations

from r1kern.config.sections import Judge, NonNegative, Positive, Section


class JudgeConfig(Section):
    """`r1kern judge`: one model's answers against another's."""

    judge: Judge
    bootstrap_rounds: Positive = 1000
    seed: NonNegative = 0  # of the bootstrap
