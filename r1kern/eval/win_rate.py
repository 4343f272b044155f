"""Win rates of one model against another, from pairwise judgements: pure functions.

Outcomes are 1 (the model wins), 0.5 (tie), 0 (the baseline wins). Intervals are percentile
bootstraps over questions: the two games of a question are never torn apart (Arena-Hard's own
scripts resample games).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from r1kern.rewards.judging.prompts import LABELS

STRONG_WEIGHT = 3  # Arena-Hard counts a significant win or loss three times
RIDGE = 0.01  # keeps a fit finite where outcomes or lengths separate
NEWTON_STEPS = 50
LONGEST_STEP = 2.0


def arena_hard(labels: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of each question in Arena-Hard's protocol; the score is their quotient.

    Each of the two games is one battle, or three for a significant verdict; a tie is half a win.
    The score is the share of battles won, in [0, 1]. It is also the win rate that the Bradley-Terry
    model of Arena-Hard v0.1 predicts, whose fit to two players is that share.

    Source: arXiv 2406.11939, and `show_result.py` of lmarena/arena-hard-auto.

    Args:
        labels: of Q questions: what the judge said with the model's answer as A, then with the
            baseline's as A.

    Returns:
        points, weights: float64 [Q].
    """
    points, weights = np.zeros(len(labels)), np.zeros(len(labels))
    for question, (first, swapped) in enumerate(labels):
        for better in (LABELS[first], -LABELS[swapped]):
            weight = STRONG_WEIGHT if abs(better) == 2 else 1
            points[question] += weight * (1 + np.sign(better)) / 2
            weights[question] += weight
    return points, weights


def agreement(labels: Sequence[tuple[str, str]]) -> float:
    """Share of questions that both orders decide the same way; arguments as of `arena_hard`."""
    same = [np.sign(LABELS[first]) == -np.sign(LABELS[swapped]) for first, swapped in labels]
    return float(np.mean(same))


def length_controlled(
    outcomes: np.ndarray, lengths: np.ndarray, baseline_lengths: np.ndarray
) -> float:
    """The win rate to expect were both models' answers of equal length.

    A logistic model of the outcome, `sigmoid(theta + phi * tanh(difference / std(difference)))`,
    at difference 0 (length-controlled AlpacaEval, arXiv 2404.04475, equation 1). Plainer than
    theirs: no difficulty of the instruction (it is published for their 805 only), no regularisation
    towards answers of prompted baselines; a weak ridge instead of their cross-validated L1.

    Args:
        outcomes: float64 [Q].
        lengths, baseline_lengths: characters, [Q].
    """
    difference = np.asarray(lengths, float) - np.asarray(baseline_lengths, float)
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    design = np.stack([np.ones_like(x), x], axis=1)
    coefficients = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-design @ coefficients))
        gradient = design.T @ (chance - outcomes) + RIDGE * coefficients
        curvature = (design.T * (chance * (1 - chance))) @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        longest = np.abs(step).max()
        coefficients -= step * min(1.0, LONGEST_STEP / longest) if longest else 0.0
        if longest < 1e-10:
            break
    return float(1 / (1 + np.exp(-coefficients[0])))


def interval(
    questions: int, statistic: Callable[[np.ndarray], float], *, rounds: int, seed: int
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a statistic.

    Args:
        questions: Q.
        statistic: of int64 [Q] indices of questions, drawn with replacement.
        rounds: resamples.
    """
    draws = np.random.default_rng(seed)
    values = [statistic(draws.integers(questions, size=questions)) for _ in range(rounds)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
