import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1kern.eval.metrics import majority_vote, pass_at_1, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([i < c for i in range(n)], k))
        share = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@given(st.data())
def test_pass_at_k_equals_exact_binomials(data):
    n = data.draw(st.integers(1, 2000))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-9)


def test_pass_at_k_does_not_overflow():
    assert pass_at_k(2000, 2000, 1500) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (0, 0, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_pass_at_1_weighs_problems_the_same():
    assert pass_at_1([True, False, True, False]) == 0.5
    assert pass_at_1([[True], [False, False, False, True]]) == 0.625
    assert pass_at_1((True,)) == 1.0


@pytest.mark.parametrize("correct", [[], [[True], []]])
def test_pass_at_1_of_nothing_is_refused(correct):
    with pytest.raises(ValueError, match="undefined"):
        pass_at_1(correct)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["72", "71", "72"], "72"),
        (["71", "0.5", "\\frac{1}{2}", "71", "1/2"], "0.5"),
        (["5", "x=5", "4", "4"], "5"),
        (["x=5", "5", "5", "4", "4"], "x=5"),
        (["3", "1<x<2", "(1,2)"], "1<x<2"),
        (["3", "(1,2)", "1<x<2"], "(1,2)"),
        ([None, None, "7"], "7"),
        ([None, None], None),
        ([], None),
        (["8", "9"], "8"),
        (["9", "8", "8", "9"], "9"),
        (["", "", "3"], ""),
    ],
)
def test_majority_vote(answers, winner):
    assert majority_vote(answers) == winner


@given(st.lists(st.sampled_from(["1", "1.0", "2", "02", "3", None]), max_size=12))
def test_majority_vote_counts_equal_numbers_together(answers):
    voters = [answer for answer in answers if answer is not None]
    counts = {}
    for answer in voters:
        counts[float(answer)] = counts.get(float(answer), 0) + 1
    winner = majority_vote(answers)
    if not voters:
        assert winner is None
    else:
        most = max(counts.values())
        assert winner == next(a for a in voters if counts[float(a)] == most)
