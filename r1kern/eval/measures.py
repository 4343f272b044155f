"""From a benchmark's graded samples to its metrics."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

from r1kern.eval.metrics import confidence_interval, majority_vote, pass_at_1, pass_at_k
from r1kern.rewards.math import verify
from r1kern.rewards.math_answer import final_answer
from r1kern.types import Rollout

VOTERS = 64  # the paper's cons@64


def measure(rollouts: Iterable[Rollout]) -> dict:
    """Metrics of one benchmark; rollouts are read once, one after the other.

    A sample whose grader failed is neither right nor wrong: it is left out of the rates and
    counted; so is a problem without a judged sample.

    Args:
        rollouts: a graded group a problem, with the terms "accuracy" and "format".

    Returns:
        As JSON values: problems, samples (of a problem), pass@1 with its 95 % interval and what
        kind it is, pass@k for k = 2, 4, ... (unbiased), cons@k (mathematics and multiple choice;
        a vote of the first 64 samples at most), truncated (share that ran out of tokens), tokens
        (mean length), format, grader_failures, unjudged_problems; pass@1 and what follows from it
        are None where nothing was judged.
    """
    correct: list[list[bool]] = []
    votes: list[bool] = []
    truncated, tokens, formatted = [], [], []
    failures = unjudged = samples = 0
    voters = None
    for rollout in rollouts:
        judged = [s.terms["accuracy"] == 1.0 for s in rollout.scores if "accuracy" in s.terms]
        correct += [judged] if judged else []
        unjudged += not judged
        failures += sum(score.failure is not None for score in rollout.scores)
        samples = max(samples, len(rollout.completions))
        truncated += [c.finish == "length" for c in rollout.completions]
        tokens += [len(c.ids) for c in rollout.completions]
        formatted += [s.terms["format"] for s in rollout.scores if "format" in s.terms]
        if rollout.prompt.task in ("math", "choice"):
            voters = min(VOTERS, len(rollout.completions))
            votes.append(_consensus(rollout, voters))
    return {
        "problems": len(correct) + unjudged,
        "samples": samples,
        **_rates(correct),
        **({f"cons@{voters}": mean(votes)} if voters else {}),
        "truncated": mean(truncated),
        "tokens": mean(tokens),
        "format": mean(formatted) if formatted else None,
        "grader_failures": failures,
        "unjudged_problems": unjudged,
    }


def _rates(correct: list[list[bool]]) -> dict:
    if not correct:
        return {"pass@1": None, "interval": None}
    least = min(map(len, correct))
    powers = [1 << i for i in range(1, least.bit_length()) if 1 << i <= least]
    at_k = {f"pass@{k}": mean(pass_at_k(len(row), sum(row), k) for row in correct) for k in powers}
    single = all(len(row) == 1 for row in correct)
    return {
        "pass@1": pass_at_1(correct),
        "interval": list(confidence_interval(correct)),
        "interval_kind": "Wilson" if single else "normal over problems",
        **at_k,
    }


def _consensus(rollout: Rollout, voters: int) -> bool:
    """Whether the answer that most of the first samples give is right; without one, no vote."""
    answers = [final_answer(c.text) or None for c in rollout.completions[:voters]]
    winner = majority_vote(answers)
    return winner is not None and verify(f"\\boxed{{{winner}}}", rollout.prompt.answer)
