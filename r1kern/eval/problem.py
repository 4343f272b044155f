"""One problem of a benchmark, before it is rendered and tokenised."""

from __future__ import annotations

from typing import NamedTuple

from r1kern.data.records import Record


class Problem(NamedTuple):
    """What is asked, and what judges the answer.

    Attributes:
        id: unique in its benchmark, None where the record has none.
        question: zero-shot, with the benchmark's instruction (mathematics excepted).
        answer: gold, raw text; "" for programs.
        task: see `types.Prompt`.
        tests: as `rewards.code.run_tests` takes them.
    """

    id: str | None
    question: str
    answer: str = ""
    task: str = "math"
    tests: tuple = ()


class LeftOut(Exception):
    """This record is not asked; the message is the reason, counted and reported."""


def first(record: Record, *fields: str) -> str:
    """The first of the fields that the record has, the first of all where it has none."""
    return next((field for field in fields if field in record.values), fields[0])
