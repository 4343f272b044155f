"""Reranking N samples with a reward model, beside majority voting: pure functions.

DeepSeek-R1 (arXiv 2501.12948), section 4.2, on reward models that score outcomes or steps. Each
figure is the expectation over subsets of N of the k samples drawn for a problem, which is unbiased
for fresh N samples; ties are shared.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from r1kern.eval.metrics import pass_at_k

Aggregate = Literal["min", "prod", "last"]


@dataclass(frozen=True)
class Sample:
    """One graded and scored sample of a problem.

    Attributes:
        correct: whether its answer is right.
        answer: what it votes for; equal answers must be equal here
            (`metrics.answer_classes`). None does not vote.
        score: the reward model's, higher is better; of any range.
        weight: what its vote counts in the weighted vote, at least 0 (the paper's sources use the
            reward model's probability; a sigmoid makes one of a Bradley-Terry score).
    """

    correct: bool
    answer: Hashable | None
    score: float
    weight: float


def of_steps(scores: Sequence[float], how: Aggregate = "min") -> float:
    """The score of a solution from its steps' (process reward model).

    Args:
        scores: one a step, in order; probabilities for "prod" (arXiv 2305.20050 takes the product,
            arXiv 2312.08935 the minimum).

    Raises:
        ValueError: no steps, or a score that is not finite.
    """
    if not scores or not all(map(math.isfinite, scores)):
        raise ValueError(f"a solution needs finite scores of its steps, not {list(scores)}")
    return {"min": min, "prod": math.prod, "last": lambda steps: steps[-1]}[how](scores)


def best_of_n(samples: Sequence[Sample], n: int) -> float:
    """Chance that the best scored of n samples is correct; exact.

    The best of a subset lies in the highest tied group that it touches, and is each member of the
    group with the same chance.

    Args:
        samples: k samples of one problem.
        n: how many are ranked, 1 to k.

    Raises:
        ValueError: n is out of range, or a score is not finite.
    """
    _check(samples, n)
    groups = itertools.groupby(sorted(samples, key=_score), key=_score)
    subsets = math.comb(len(samples), n)
    below, expected = 0, 0.0
    for _, members in groups:
        group = list(members)
        upto = below + len(group)
        chance = (math.comb(upto, n) - math.comb(below, n)) / subsets
        expected += chance * _mean(sample.correct for sample in group)
        below = upto
    return expected


def vote(
    samples: Sequence[Sample], n: int, *, weighted: bool, draws: int = 1000, seed: int = 0
) -> float:
    """Chance that the answer with most votes among n samples is correct.

    An answer of samples that were graded differently is as correct as they are on average. Where
    nobody votes, or every vote weighs 0, the answer is wrong.

    Args:
        samples: k samples of one problem.
        n: how many vote, 1 to k.
        weighted: votes count `weight` instead of 1.
        draws: subsets looked at. Where there are no more than that, each one is, and the figure is
            exact; else it is the mean of so many random ones.
        seed: of the random subsets.

    Raises:
        ValueError: n is out of range, or a weight is negative or not finite.
    """
    _check(samples, n)
    if math.comb(len(samples), n) <= draws:
        subsets = itertools.combinations(samples, n)
    else:
        chance = random.Random(seed)
        subsets = (chance.sample(samples, n) for _ in range(draws))
    correctness = _correctness(samples)
    return _mean(_elected(subset, correctness, weighted) for subset in subsets)


def compare_rerankers(
    problems: Sequence[Sequence[Sample]], ns: Sequence[int], *, draws: int = 1000, seed: int = 0
) -> dict[int, dict[str, float]]:
    """For each N the mean over problems of four figures.

    Returns:
        N -> "best_of_n", "majority", "weighted_majority" and "pass@n", the share of problems that
        a perfect ranking would solve; all in [0, 1].

    Raises:
        ValueError: no problems, or one with fewer samples than the largest N.
    """
    if not problems:
        raise ValueError("best-of-N of no problems is undefined: give at least one")

    def figures(n: int) -> dict[str, float]:
        voting = dict(draws=draws, seed=seed)
        of_problem = [
            {
                "best_of_n": best_of_n(samples, n),
                "majority": vote(samples, n, weighted=False, **voting),
                "weighted_majority": vote(samples, n, weighted=True, **voting),
                "pass@n": pass_at_k(len(samples), sum(s.correct for s in samples), n),
            }
            for samples in problems
        ]
        return {name: _mean(row[name] for row in of_problem) for name in of_problem[0]}

    return {n: figures(n) for n in ns}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _score(sample: Sample) -> float:
    return sample.score


def _check(samples: Sequence[Sample], n: int) -> None:
    if not 1 <= n <= len(samples):
        raise ValueError(f"best-of-N needs 1 <= N <= k, not N={n}, k={len(samples)}: draw more")
    for sample in samples:
        if not (math.isfinite(sample.score) and 0 <= sample.weight < math.inf):
            raise ValueError(f"{sample} needs a finite score and a weight of at least 0")


def _correctness(samples: Sequence[Sample]) -> dict[Hashable, float]:
    graded: dict[Hashable, list[bool]] = {}
    for sample in samples:
        graded.setdefault(sample.answer, []).append(sample.correct)
    return {answer: _mean(marks) for answer, marks in graded.items()}


def _elected(subset: Sequence[Sample], correctness: dict[Hashable, float], weighted: bool) -> float:
    votes: dict[Hashable, list[float]] = {}
    for sample in subset:
        if sample.answer is not None:
            votes.setdefault(sample.answer, []).append(sample.weight if weighted else 1.0)
    totals = {answer: math.fsum(own) for answer, own in votes.items()}  # of the order independent
    most = max(totals.values(), default=0.0)
    if most == 0:
        return 0.0
    return _mean(correctness[answer] for answer, total in totals.items() if total == most)
