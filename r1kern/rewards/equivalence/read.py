"""What an answer says: its formula, unit and words told apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1kern.rewards.equivalence.parse import parse
from r1kern.rewards.equivalence.text import number_word, split_unit, words
from r1kern.rewards.equivalence.tokens import Node, UnknownCommand, Unreadable
from r1kern.rewards.equivalence.value import variables

Unit = tuple[str, float]


@dataclass(frozen=True)
class Reading:
    """What an answer says: its tree and unit, where it is mathematics, and its plain text."""

    text: str
    node: Node | None = None
    unit: Unit | None = None
    unknown: bool = False


_QUALIFIED = re.compile(
    r"\b(?:not|no|less|more|least|most|than|between|about|approximately|around|nearly|either|maybe|"
    r"neither|nor|january|february|march|april|may|june|july|august|september|october|november|"
    r"december|monday|tuesday|wednesday|thursday|friday|saturday|sunday|wrong|if|but|instead|except|unless|or)\b",
    re.IGNORECASE,
)
_FORMULA_START = re.compile(r"[-+\d\\(\[{]|[a-zA-Z](?=\s*[=(_^<>]|$)|sqrt|pi\b")
_TAIL_WORDS = re.compile(r"(?P<value>.*[\d}\])])\s*(?P<words>[A-Za-z][A-Za-z' -]{2,60})", re.DOTALL)
_TIME = re.compile(r"(\d{1,2}) ?: ?(\d\d) *([ap])\.? ?m\b\.?", re.IGNORECASE)
_RATIO = re.compile(r"(\d+) to (\d+)")


def read(text: str) -> Reading:
    """What the normalised text of an answer says."""
    if time := _TIME.fullmatch(text):
        return Reading(
            text, Node("group", ("time", time[3].lower(), (whole(time[1]), whole(time[2]))))
        )
    text = _RATIO.sub(r"\1:\2", number_word(text))
    for candidate in dict.fromkeys((text, _formula(text))):
        for formula, unit in (split_unit(candidate), (candidate, None)):
            try:
                return Reading(text, parse(formula), unit)
            except UnknownCommand:
                return Reading(text, unknown=True)
            except Unreadable:
                continue
    tail = _TAIL_WORDS.fullmatch(_formula(text))
    if tail and not _QUALIFIED.search(text):
        node = try_parse(tail["value"])
        if node is not None and not variables(node):
            return Reading(text, node, (_singular(tail["words"]), 1.0))
    return Reading(text)


def try_parse(text: str) -> Node | None:
    try:
        return parse(text)
    except Unreadable:
        return None


def _formula(text: str) -> str:
    """The text from its formula on, if only harmless words lead up to it."""
    prefix = re.match(r"(?:\\?[A-Za-z'-]+[ :]+)*", text)[0]
    rest = text[len(prefix) :]
    if not prefix or "\\" in prefix or not rest or _QUALIFIED.search(prefix):
        return text
    while prefix and not _FORMULA_START.match(rest):
        return text
    return rest


def _singular(text: str) -> str:
    text = " ".join(words(text).split())
    return text[:-1] if text.endswith("s") and len(text) > 3 else text


def whole(digits: str) -> Node:
    return Node("num", (Fraction(digits), 0))
