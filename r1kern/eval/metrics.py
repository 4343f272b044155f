"""Metrics over k samples per problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from r1kern.rewards.math import shared_grader

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


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


def confidence_interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % confidence interval of pass@1 over problems drawn like these.

    With one sample a problem it is Wilson's score interval. With more, the normal approximation
    over the problems' own pass rates, whose spread holds both that of the problems and that of the
    samples; it says nothing where all problems have the same rate.

    Args:
        correct: the samples of each problem.

    Raises:
        ValueError: as `pass_at_1`.
    """
    rate, n = pass_at_1(correct), len(correct)
    if all(len(samples) == 1 for samples in correct):
        return wilson_interval(sum(bool(samples[0]) for samples in correct), n)
    rates = [pass_at_1(samples) for samples in correct]
    variance = sum((r - rate) ** 2 for r in rates) / max(1, n - 1)
    half = Z95 * (variance / n) ** 0.5
    return max(0.0, rate - half), min(1.0, rate + half)


def wilson_interval(c: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion of c in n (Wilson 1927).

    Raises:
        ValueError: unless 0 <= c <= n and n > 0.
    """
    if not 0 <= c <= n or n == 0:
        raise ValueError(f"a proportion needs 0 <= c <= n and n > 0, not c={c}, n={n}")
    z2 = Z95 * Z95
    middle = (c + z2 / 2) / (n + z2)
    half = Z95 * (c * (n - c) / n + z2 / 4) ** 0.5 / (n + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
