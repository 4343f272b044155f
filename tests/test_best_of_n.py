"""Best-of-N against what happens in every ordered draw, counted one by one."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1kern.eval.best_of_n import Sample, best_of_n, compare_rerankers, of_steps, vote
from r1kern.eval.metrics import answer_classes, majority_vote, pass_at_k

RIGHT = "a"


@st.composite
def problems(draw):
    """Few distinct answers, scores and weights: ties everywhere. One answer is right."""
    k = draw(st.integers(1, 5))
    answers = draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=k, max_size=k))
    scores = draw(st.lists(st.sampled_from([-1.5, 0.0, 2.0]), min_size=k, max_size=k))
    weights = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=k, max_size=k))
    samples = [
        Sample(answer == RIGHT, answer, score, weight)
        for answer, score, weight in zip(answers, scores, weights, strict=True)
    ]
    return samples, draw(st.integers(1, k))


def first_best(draw: tuple[Sample, ...]) -> bool:
    best = draw[0]
    for sample in draw[1:]:
        if sample.score > best.score:
            best = sample
    return best.correct


def first_elected(draw: tuple[Sample, ...], weighted: bool) -> bool:
    totals: dict[str, float] = {}
    for sample in draw:
        if sample.answer is not None:
            totals[sample.answer] = totals.get(sample.answer, 0) + (
                sample.weight if weighted else 1
            )
    answers = [answer for answer, total in totals.items() if total == max(totals.values()) > 0]
    if not answers:
        return False
    # Of tied answers each comes first equally often in plain votes; with weights they share.
    return Fraction(sum(answer == RIGHT for answer in answers), len(answers))


def over_all_draws(samples, n, outcome) -> float:
    outcomes = [Fraction(outcome(draw)) for draw in itertools.permutations(samples, n)]
    return float(sum(outcomes) / len(outcomes))


@settings(max_examples=50)
@given(problems())
def test_figures_are_means_over_all_ordered_draws(problem):
    samples, n = problem
    assert best_of_n(samples, n) == pytest.approx(over_all_draws(samples, n, first_best), abs=1e-12)
    plain = over_all_draws(samples, n, lambda draw: first_elected(draw, False))
    assert vote(samples, n, weighted=False) == pytest.approx(plain, abs=1e-12)
    weighted = over_all_draws(samples, n, lambda draw: first_elected(draw, True))
    assert vote(samples, n, weighted=True) == pytest.approx(weighted, abs=1e-12)


def test_a_vote_is_the_mean_of_cons_at_n():
    samples = [Sample(answer == RIGHT, answer, 0.0, 1.0) for answer in ("a", "b", "c", "a")]
    cons = over_all_draws(samples, 3, lambda draw: majority_vote([s.answer for s in draw]) == RIGHT)
    assert vote(samples, 3, weighted=False) == pytest.approx(cons, abs=1e-12)


def test_a_perfect_score_reaches_pass_at_n_and_a_reversed_one_all_correct():
    correct = [i % 3 == 0 for i in range(20)]
    perfect = [Sample(c, str(c), float(c), 1.0) for c in correct]
    reversed_ = [Sample(c, str(c), -float(c), 1.0) for c in correct]
    for n in (1, 4, 20):
        assert best_of_n(perfect, n) == pytest.approx(pass_at_k(20, sum(correct), n))
        all_correct = math.comb(sum(correct), n) / math.comb(20, n)
        assert best_of_n(reversed_, n) == pytest.approx(all_correct)


def test_random_subsets_come_near_the_exact_figure():
    samples = [Sample(i % 5 < 2, "ab"[i % 5 >= 2], 0.0, 1.0 + i % 3) for i in range(16)]
    for weighted in (False, True):
        exact = vote(samples, 6, weighted=weighted, draws=10_000)  # 8008 subsets
        estimates = [vote(samples, 6, weighted=weighted, draws=500, seed=s) for s in range(8)]
        assert len(set(estimates)) > 1
        assert sum(estimates) / 8 == pytest.approx(exact, abs=4 * 0.5 / 4000**0.5)
        assert estimates[0] == vote(samples, 6, weighted=weighted, draws=500, seed=0)


def test_an_answer_graded_both_ways_counts_in_between():
    samples = [Sample(True, "x", 0.0, 1.0), Sample(False, "x", 0.0, 1.0)]
    assert vote(samples, 2, weighted=False) == 0.5
    assert vote([Sample(False, None, 0.0, 1.0)], 1, weighted=False) == 0.0


def test_steps_become_one_score():
    steps = [0.5, 0.25, 0.75]
    assert of_steps(steps) == 0.25
    assert of_steps(steps, "prod") == 0.09375
    assert of_steps(steps, "last") == 0.75
    for bad in ([], [0.5, math.nan]):
        with pytest.raises(ValueError, match="finite scores of its steps"):
            of_steps(bad)


def test_the_table_is_a_mean_over_problems():
    good = [Sample(True, "1", 1.0, 0.9), Sample(False, "2", 0.0, 0.1), Sample(False, "2", 0.5, 0.1)]
    bad = [Sample(False, "3", 1.0, 0.9)] * 3
    table = compare_rerankers([good, bad], [1, 3])
    assert table[3] == {
        "best_of_n": 0.5,
        "majority": 0.0,
        "weighted_majority": 0.5,
        "pass@n": 0.5,
    }
    assert list(table[1].values()) == pytest.approx([1 / 6] * 4)


def test_bad_arguments_are_refused():
    sample = Sample(True, "1", 1.0, 1.0)
    for n in (0, 2):
        with pytest.raises(ValueError, match="1 <= N <= k"):
            best_of_n([sample], n)
    for wrong in (Sample(True, "1", math.nan, 1.0), Sample(True, "1", 0.0, -1.0)):
        with pytest.raises(ValueError, match="finite score and a weight of at least 0"):
            vote([wrong], 1, weighted=True)
    with pytest.raises(ValueError, match="no problems"):
        compare_rerankers([], [1])


def test_classes_name_equal_answers_alike():
    assert answer_classes(["0.5", None, r"\frac{1}{2}", "3"]) == ["0.5", None, "0.5", "3"]
