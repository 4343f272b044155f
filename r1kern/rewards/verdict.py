"""What a grader says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What the grader says of one answer.

    Attributes:
        correct: whether the answer is right.
        failure: why the grader could not judge (then `correct` is False), or None.
    """

    correct: bool
    failure: str | None = None
