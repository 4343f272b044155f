"""From rollouts to scores: every reward term by name, and their weighted sum."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence

from r1kern.errors import UserError
from r1kern.rewards.format import format_reward
from r1kern.rewards.math import MathGrader, shared_grader
from r1kern.rewards.verdict import Verdict
from r1kern.types import Completion, Prompt, Rollout, Score

Reward = Callable[[Completion, Prompt], float]


def score_rollouts(
    rollouts: Sequence[Rollout],
    weights: Mapping[str, float],
    *,
    extra: Mapping[str, Reward] | None = None,
    grader: MathGrader | None = None,
) -> list[Rollout]:
    """The rollouts with one `Score` per completion.

    The terms are "accuracy" (1 when the text gives the prompt's answer), "format", and those of
    `extra`. A term whose grader failed is left out of `Score.terms`; the score then names the
    failure and its total is 0, to be left out of the update.

    Args:
        weights: weight of each term in the total (the paper sums accuracy and format); only the
            terms named here are computed.
        extra: rewards of your own, by name; an exception or a value that is not finite is a
            failure of that completion's grader.
        grader: judges accuracy; the process-wide one by default.

    Raises:
        UserError: `weights` is empty or names a term that nobody computes.
    """
    extra = dict(extra or {})
    _check_terms(weights, {"accuracy", "format", *extra})
    samples = [(sample, rollout.prompt) for rollout in rollouts for sample in rollout.completions]
    verdicts: list[Verdict | None] = [None] * len(samples)
    if "accuracy" in weights:
        pairs = [(sample.text, prompt.answer) for sample, prompt in samples]
        verdicts = (grader or shared_grader()).grade(pairs)
    rewards = {name: extra[name] for name in weights if name in extra}
    scores = iter(
        [
            _score(sample, prompt, verdict, weights, rewards)
            for (sample, prompt), verdict in zip(samples, verdicts, strict=True)
        ]
    )
    return [
        dataclasses.replace(rollout, scores=tuple(next(scores) for _ in rollout.completions))
        for rollout in rollouts
    ]


def _score(
    sample: Completion,
    prompt: Prompt,
    verdict: Verdict | None,
    weights: Mapping[str, float],
    rewards: Mapping[str, Reward],
) -> Score:
    terms: dict[str, float] = {}
    failures = []
    if verdict is not None and verdict.failure is None:
        terms["accuracy"] = float(verdict.correct)
    elif verdict is not None:
        failures.append(f"accuracy: {verdict.failure}")
    if "format" in weights:
        terms["format"] = format_reward(sample.text)
    for name, reward in rewards.items():
        try:
            value = float(reward(sample, prompt))
        except Exception as error:  # whatever a user's grader raises is that grader's failure
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if math.isfinite(value):
            terms[name] = value
        else:
            failures.append(f"{name}: returned {value}")
    if failures:
        return Score(terms, 0.0, "; ".join(failures))
    return Score(terms, sum(weights[name] * terms[name] for name in weights))


def _check_terms(weights: Mapping[str, float], known: set[str]) -> None:
    if not weights:
        raise UserError(f"no reward terms: give a weight to at least one of {sorted(known)}")
    for name, weight in weights.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown reward term '{name}': did you mean '{near}'?")
        if not math.isfinite(weight):
            raise UserError(f"the weight of reward term '{name}' is {weight}: give a finite number")
