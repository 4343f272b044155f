"""Length and repetition penalties."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1kern.rewards.length import overlong, repetition


@pytest.mark.parametrize(
    ("tokens", "expected"),
    # the paper's own setting: 16,384 expected tokens and 4,096 of cache, 20,480 in all
    [(0, 0), (16_384, 0), (17_408, -0.25), (18_432, -0.5), (20_480, -1), (20_481, -1), (10**6, -1)],
)
def test_overlong_is_dapos_equation_13(tokens, expected):
    assert overlong(tokens, max_tokens=20_480, buffer=4_096) == expected


def test_overlong_without_a_buffer_is_a_step():
    assert [overlong(n, max_tokens=8, buffer=0) for n in (0, 8, 9)] == [0, 0, -1]


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.data())
def test_overlong_falls_within_its_range(tokens, limit, data):
    buffer = data.draw(st.integers(0, limit))
    value = overlong(tokens, max_tokens=limit, buffer=buffer)
    assert -1 <= overlong(tokens + 1, max_tokens=limit, buffer=buffer) <= value <= 0


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("", 2, 0),
        ("one", 2, 0),
        ("one two three four", 2, 0),
        ("so so so so so", 1, 1 / 5 - 1),
        ("so so so so so", 2, 1 / 4 - 1),
        ("a b a b a b", 2, 2 / 5 - 1),
        ("The cat the CAT", 2, 2 / 3 - 1),
        ("我们我们我们", 2, 2 / 5 - 1),
        ("我们计算它的值", 2, 0),
        ("ありがとう ありがとう", 3, 5 / 8 - 1),
        ("用 Python 用 Python", 2, 2 / 3 - 1),
        ("用Python用Python", 2, 2 / 3 - 1),
    ],
)
def test_repetition_counts_repeated_ngrams(text, ngram, expected):
    assert repetition(text, ngram=ngram) == pytest.approx(expected)


@given(st.text(max_size=300), st.integers(1, 8))
def test_repetition_of_any_text(text, ngram):
    once = repetition(text, ngram=ngram)
    assert -1 <= once <= 0
    twice = repetition(text + "\n" + text, ngram=ngram)
    assert -1 <= twice <= 0


@pytest.mark.parametrize("text", ["a" * 2_000_000, "的" * 1_000_000, "so " * 700_000])
def test_repetition_takes_linear_time(text):
    start = time.process_time()
    repetition(text, ngram=8)
    assert time.process_time() - start < 10
