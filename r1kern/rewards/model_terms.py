"""Scores of reward models as further terms of graded rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from r1kern.types import Rollout, Score


def add_terms(
    rollouts: Sequence[Rollout],
    scores: Sequence[Sequence[Mapping[str, float]]],
    weights: Mapping[str, float],
) -> list[Rollout]:
    """The rollouts with the models' scores among their terms, and weighed into their totals.

    A completion that a model could not score, or whose score is not finite, has failed, as by any
    other grader: its total is 0, to be left out of the update.

    Args:
        rollouts: graded, one `Score` per completion.
        scores: score by model for every completion, as `RewardModels.score` gives it.
        weights: of every model.
    """
    return [
        dataclasses.replace(
            rollout,
            scores=tuple(
                _with(score, found, weights)
                for score, found in zip(rollout.scores, row, strict=True)
            ),
        )
        for rollout, row in zip(rollouts, scores, strict=True)
    ]


def _with(score: Score, found: Mapping[str, float], weights: Mapping[str, float]) -> Score:
    terms, failures = dict(score.terms), [score.failure] if score.failure else []
    for name in weights:
        if name not in found:
            failures.append(f"{name}: too long for the reward model")
        elif not math.isfinite(found[name]):
            failures.append(f"{name}: scored {found[name]}")
        else:
            terms[name] = found[name]
    if failures:
        return Score(terms, 0.0, "; ".join(failures))
    return Score(terms, score.total + sum(weights[name] * found[name] for name in weights))
