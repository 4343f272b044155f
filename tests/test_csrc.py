"""The C++ functions of `r1kern._C` against plain Python."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from r1kern import _C


def first_fit_decreasing(lengths, budget):
    """Johnson's algorithm, word for word."""
    rooms, bins = [], [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [k for k, room in enumerate(rooms) if room >= lengths[i]]
        if not fitting:
            rooms.append(budget)
            fitting = [len(rooms) - 1]
        bins[i] = fitting[0]
        rooms[fitting[0]] -= lengths[i]
    return bins


@st.composite
def problems(draw):
    budget = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(0, budget), max_size=80)), budget


@given(problems())
@example(([], 1))
@example(([0, 0, 0], 1))
@example(([1, 1, 1], 1))
@example(([4, 4, 3, 3, 3, 3], 10))
def test_pack_ffd_is_first_fit_decreasing(problem):
    lengths, budget = problem
    bins = _C.pack_ffd(np.array(lengths, dtype=np.int64), budget)
    assert bins.dtype == np.int64
    assert bins.tolist() == first_fit_decreasing(lengths, budget)


def test_pack_ffd_takes_lengths_beyond_32_bits():
    big = 2**40
    lengths = np.array([big, big - 1, 1, 2], dtype=np.int64)
    assert _C.pack_ffd(lengths, big + 1).tolist() == [0, 1, 0, 1]


def test_pack_ffd_takes_strided_and_narrow_arrays():
    wide = np.arange(20, dtype=np.int64)
    expected = first_fit_decreasing(wide[::2].tolist(), 20)
    assert _C.pack_ffd(wide[::2], 20).tolist() == expected
    assert _C.pack_ffd(wide[::2].astype(np.int32), 20).tolist() == expected


@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [
        ([3, 11, 2], 10, "sequence 1 has 11 tokens, more than the budget of 10: raise"),
        ([3, -1], 10, "sequence 1 has length -1: it must not be negative"),
        ([], 0, "the token budget is 0: it must be at least 1"),
        ([[1, 2]], 10, "lengths must have one dimension"),
    ],
)
def test_pack_ffd_refuses_in_one_line(lengths, budget, message):
    with pytest.raises(ValueError, match=message) as caught:
        _C.pack_ffd(np.array(lengths, dtype=np.int64), budget)
    assert "\n" not in str(caught.value)


def test_pack_ffd_refuses_floats_rather_than_truncating():
    with pytest.raises(TypeError):
        _C.pack_ffd(np.array([1.5, 2.5]), 10)
