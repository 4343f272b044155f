"""Metrics over k samples per problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from r1kern.rewards.math import shared_grader


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct: 1 - C(n-c, k) / C(n, k).

    Source: "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), equation 1.

    Args:
        n: samples drawn.
        c: correct ones among them.
        k: samples allowed, at most n.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, not k={k}, n={n}: draw more samples")
    if not 0 <= c <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n correct samples, not c={c}, n={n}")
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= max(0.0, 1.0 - k / i)
    return 1.0 - missed


def pass_at_1(correct: Sequence[bool] | Sequence[Sequence[bool]]) -> float:
    """The paper's pass@1: the mean correctness of the k samples of a problem, 1/k sum_i p_i.

    Source: DeepSeek-R1 (arXiv 2501.12948), section 3, evaluation setup.

    Args:
        correct: the samples of one problem, or of each of many problems: then the mean over
            problems, each weighing the same.

    Raises:
        ValueError: no problem, or a problem without samples.
    """
    if len(correct) == 0:
        raise ValueError("pass@1 of no samples is undefined: give at least one")
    if hasattr(correct[0], "__len__"):
        return sum(pass_at_1(samples) for samples in correct) / len(correct)
    return sum(map(bool, correct)) / len(correct)


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The answer most samples agree on (cons@k); mathematically equal answers are one class.

    Args:
        answers: one per sample, None where a sample has none; those do not vote.

    Returns:
        The first-seen answer of the largest class, of the earliest such class in a tie; None when
        nobody voted.
    """
    counts = Counter(answer for answer in answer_classes(answers) if answer is not None)
    return max(counts, key=counts.get, default=None)


def answer_classes(answers: Sequence[str | None]) -> list[str | None]:
    """Each answer's class, named by the first-seen answer in it; None stays None.

    An answer belongs to the first class whose first member it equals, by `verify` in either
    direction.
    """
    representative: dict[str, str] = {}
    firsts: list[str] = []
    for answer in answers:
        if answer is None or answer in representative:
            continue
        representative[answer] = _class_of(answer, firsts)
        if representative[answer] == answer:
            firsts.append(answer)
    return [None if answer is None else representative[answer] for answer in answers]


def _class_of(answer: str, firsts: list[str]) -> str:
    pairs = [pair for first in firsts for pair in ((answer, first), (first, answer))]
    verdicts = shared_grader().grade(pairs)
    for i, first in enumerate(firsts):
        if verdicts[2 * i].correct or verdicts[2 * i + 1].correct:
            return first
    return answer
