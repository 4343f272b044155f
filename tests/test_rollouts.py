"""Graded rollouts on disk are the rollouts, bit for bit: a resumed run trains on them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from r1kern.report.rollouts import forget_rollouts, read_rollouts, step_file, write_rollouts
from r1kern.types import Completion, Prompt, Rollout, Score

NUMBERS = st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def rollout(logps, texts=("", ""), total=0.0) -> Rollout:
    """A group of two completions."""
    ids = tuple(range(len(logps)))
    return Rollout(
        prompt=Prompt("p", (3, 4), "5", texts[0]),
        completions=(
            Completion(ids, tuple(logps), texts[1], "stop"),
            Completion((1,), (-1.5,), "", "length"),
        ),
        weight_version=7,
        scores=(Score({"accuracy": total}, total, None), Score({}, 0.0, "RecursionError")),
    )


def bits(numbers) -> bytes:
    return struct.pack(f"{len(numbers)}d", *numbers)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("rollouts") / "step_000001.jsonl"


@given(st.lists(NUMBERS), st.tuples(TEXT, TEXT), NUMBERS)
@example([-0.0, 0.0, 5e-324, -2.2250738585072014e-308, -1.7976931348623157e308, -1e-45], "ab", 0.1)
@example([float("-inf"), -0.1, -1 / 3], ("\u2028\r\n\x85", '\x00\r\\"'), -0.0)
def test_what_is_read_is_what_was_written(path, logps, texts, total):
    written = [rollout(logps, texts, total), rollout([-0.25])]
    write_rollouts(path, written)
    read = read_rollouts(path)
    assert read == written
    first = read[0]
    assert bits(first.completions[0].logps) == bits(logps)
    assert bits([first.scores[0].total, first.scores[0].terms["accuracy"]]) == bits([total] * 2)


def test_later_steps_are_forgotten(tmp_path):
    for step in (1, 2, 3):
        write_rollouts(step_file(tmp_path, step), [rollout([-1.0])])
    forget_rollouts(tmp_path, after=2)
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
