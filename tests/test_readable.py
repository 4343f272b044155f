"""Filters of rejection sampling and cold start."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1kern.errors import UserError
from r1kern.rewards.readable import Limits, why_unreadable

THOUGHT = "First we add three and four. Then we check that the sum is seven.\nSo it is seven."
SUMMARY = "The sum of three and four is seven."


def response(thought: str, summary: str = SUMMARY) -> str:
    return f"<think>\n{thought}\n</think>\n<answer>{summary}</answer>"


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (response(THOUGHT), None),
        (f"<think>{THOUGHT}</think>{SUMMARY}", None),
        (SUMMARY, None),
        (response("$3 + 4 = 7$"), None),
        (f"<think>{THOUGHT}", "unfinished"),
        (f"<think>{THOUGHT}</think><answer>{SUMMARY}", "unfinished"),
        (f"<think>{THOUGHT}</think>", "no summary"),
        ("", "no summary"),
        (response(THOUGHT + "\n```python\nprint(3 + 4)\n```"), "code block"),
        (response(THOUGHT, "Use this:\n```python\nprint(3 + 4)\n```"), None),
        (
            response(" ".join(f"{THOUGHT} {i}" for i in range(40)).replace("\n", " ")),
            "long paragraph",
        ),
        (response("So it must be seven, we are sure of it.\n" * 30), "repetition"),
        (response(THOUGHT + "\n首先我们把三和四加起来，然后检查结果。"), "mixed languages"),
        (response(THOUGHT, "三加四等于七，所以答案是七。"), "mixed languages"),
    ],
)
def test_reason_is_named(completion, reason):
    assert why_unreadable(completion, language="en") == reason


def test_wanted_language_is_the_measure():
    chinese = response("首先我们把三和四加起来，然后检查结果。", "三加四等于七。")
    assert why_unreadable(chinese, language="zh") is None
    assert why_unreadable(chinese, language="en") == "mixed languages"
    with pytest.raises(UserError, match="unknown language 'klingon'"):
        why_unreadable(chinese, language="klingon")


def test_limits_move_each_filter():
    code = response(THOUGHT + "\n```python\nprint(3 + 4)\n```")
    assert why_unreadable(code, language="en", limits=Limits(code_blocks=True)) is None
    short = Limits(paragraph=20)
    assert why_unreadable(response(THOUGHT), language="en", limits=short) == "long paragraph"
    mixed = response(THOUGHT + "\n首先我们把三和四加起来，然后检查结果。")
    assert why_unreadable(mixed, language="en", limits=Limits(consistency=0.3)) is None
    again = response("So it must be seven, we are sure of it.\n" * 30)
    assert why_unreadable(again, language="en", limits=Limits(repetition=1.0)) is None


@given(st.text(st.sampled_from("<think></think><answer></answer>`$wait 等等\n"), max_size=120))
def test_any_text_is_judged(text):
    reason = why_unreadable(text, language="en")
    assert reason is None or isinstance(reason, str)
