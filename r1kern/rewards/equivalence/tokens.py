"""Tokens of answers in LaTeX or plain notation, and the nodes of their trees."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn

MAX_TOKENS = 600
MAX_DIGITS = 400


class Unreadable(Exception):
    """The text is not an answer in the grammar."""


class UnknownCommand(Unreadable):
    """The text has mathematics that this grammar leaves out, such as an integral."""


@dataclass(frozen=True)
class Node:
    """An operation and its operands.

    `op`: "num" (value, decimals or None), "name", "text"; "+", "*", "/", "^", "neg", "pm", "mp",
    "percent", "degree", "!", "abs", "root" (radicand, index), "call" (function, base or None,
    argument); "group" (open, close, items), "set", "list" (connective, items), "matrix" (kind,
    rows), "chain" (operators, terms), "cup", "cap", "minus", "ratio", "based" (digits, base).
    """

    op: str
    args: tuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = _words("""
    sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc asin acos atan sinh cosh
    tanh coth sech csch ln log lg exp max min gcd lcm sgn Re Im arg det
""")
CONSTANTS = {"pi": "pi", "infty": "inf", "infinity": "inf", "inf": "inf", "oo": "inf", "i": "i"}
CONSTANTS |= {"e": "e", "iota": "i"}
GREEK = _words("""
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho
    sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar
    prime
""")
_WORDS = _words("""
    and or to the is are not no of in an as by if per for yes has was it
""")
RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in"}
RELATIONS |= {"equiv": "=", "approx": "~", "to": "to", "rightarrow": "to", "mapsto": "to"}
_CALCULUS = _words("""
    int iint oint sum prod lim partial mathrm pmod mod bmod cdots prime nabla oplus otimes
    implies forall exists neg land lor
""")
_LETTERS_OF_A_PRODUCT = re.compile(r"[xyzabcnkmpqrst]{4}|[A-Z]{4,5}|[a-z]")
_TOKEN = re.compile(
    r"(?P<number>\d+\.?\d*|\.\d+)(?P<repeating>\\repeating\{\d+\})?"
    r"|\\begin\{(?P<begin>[a-zA-Z*]+)\}|\\end\{(?P<end>[a-zA-Z*]+)\}"
    r"|(?P<row>\\\\)|\\(?P<command>[A-Za-z]+)|\\(?P<brace>[{}|])"
    r"|(?P<letters>[A-Za-z]+)|(?P<symbol>[-+*/^_=<>!(){}\[\],;:|&%'])|(?P<space>\s+)"
)


@dataclass(frozen=True)
class Token:
    kind: str  # number, name, symbol, command, word, begin, end
    text: str
    spaced: bool  # whether a space comes before
    value: Node | None = None


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)(?!,\d)")


def join_thousands(text: str) -> str:
    """Without thousands separators; a comma in a bracket that has no other is a separator."""
    out, last = [], 0
    for match in _THOUSANDS.finditer(text):
        before = text[: match.start()]
        depth = len(re.findall(r"[(\[]|\\\{", before)) - len(re.findall(r"[)\]]|\\\}", before))
        listed = depth > 0 and ", " not in text
        bare_set = before.endswith("{") and not re.search(r"[A-Za-z}\]^_]\s*\{$", before)
        if not listed and not bare_set:
            out += [text[last : match.start()], match[0].replace(",", "")]
            last = match.end()
    return "".join([*out, text[last:]])


def tokens(text: str) -> list[Token]:
    found: list[Token] = []
    at, spaced = 0, False
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise Unreadable(text[at : at + 1])
        at = match.end()
        if match["space"]:
            spaced = True
            continue
        found += _classify(match, spaced)
        spaced = False
        if len(found) > MAX_TOKENS:
            raise Unreadable("long")
    return found


def _classify(match: re.Match, spaced: bool) -> list[Token]:
    if match["number"]:
        return [Token("number", match["number"], spaced, _number(match))]
    for kind in ("begin", "end", "command", "symbol"):
        if match[kind]:
            return [Token(kind, match[kind], spaced)]
    if match["row"]:
        return [Token("symbol", "\\\\", spaced)]
    if match["brace"]:
        return [Token("command", match["brace"], spaced)]
    letters = match["letters"]
    lower = letters if letters in FUNCTIONS or letters in CONSTANTS else letters.lower()
    if lower in ("sqrt", "cbrt", "infinity", "inf", "pi", "oo", "abs", "theta", "alpha", "beta"):
        return [Token("command", lower, spaced)]
    if lower in FUNCTIONS and lower not in ("max", "min", "arg", "det"):
        return [Token("command", lower, spaced)]
    is_word = lower in _WORDS if len(letters) < 4 else len(set(letters)) > 2
    if is_word and not _LETTERS_OF_A_PRODUCT.fullmatch(letters):
        return [Token("word", lower, spaced)]
    return [Token("name", letter, spaced and n == 0) for n, letter in enumerate(letters)]


def _number(match: re.Match) -> Node:
    text = match["number"]
    if len(text) > MAX_DIGITS:
        raise Unreadable("digits")
    decimals = len(text.partition(".")[2])
    value = Fraction(text if not text.endswith(".") else text[:-1])
    if not match["repeating"]:
        return Node("num", (value, decimals))
    period = match["repeating"].removeprefix("\\repeating{")[:-1]
    value += Fraction(int(period), (10 ** len(period) - 1) * 10**decimals)
    return Node("num", (value, None))


def digits(text: str) -> Node:
    return Node("num", (Fraction(text), 0))


class Cursor:
    """A place in the tokens of a text."""

    def __init__(self, text: str):
        self._tokens = tokens(join_thousands(text))
        self._at = 0

    def _peek(self, ahead: int = 0) -> Token:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else Token("end of text", "", False)

    def _is(self, *texts: str, kind: str = "symbol") -> bool:
        token = self._peek()
        return token.kind == kind and token.text in texts

    def _command(self, *names: str) -> bool:
        return self._is(*names, kind="command")

    def _take(self) -> Token:
        token = self._peek()
        self._at += 1
        return token

    def _expect(self, text: str, kind: str = "symbol") -> None:
        if not self._is(text, kind=kind):
            self._refuse()
        self._at += 1

    def _refuse(self) -> NoReturn:
        token = self._peek()
        unknown = token.kind == "command" and token.text in _CALCULUS
        raise (UnknownCommand if unknown else Unreadable)(token.text)
