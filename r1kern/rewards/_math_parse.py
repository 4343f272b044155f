"""A parser of answers in LaTeX or plain notation, into a tree; what it cannot read it refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn

MAX_DEPTH = 40
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


FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "arccot",
        "arcsec",
        "arccsc",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "coth",
        "sech",
        "csch",
        "ln",
        "log",
        "lg",
        "exp",
        "max",
        "min",
        "gcd",
        "lcm",
        "sgn",
        "Re",
        "Im",
        "arg",
        "det",
    ]
)
CONSTANTS = {"pi": "pi", "infty": "inf", "infinity": "inf", "inf": "inf", "oo": "inf", "i": "i"}
CONSTANTS |= {"e": "e", "iota": "i"}
_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
        "prime",
    ]
)
_WORDS = frozenset(
    [
        "and",
        "or",
        "to",
        "the",
        "is",
        "are",
        "not",
        "no",
        "of",
        "in",
        "an",
        "as",
        "by",
        "if",
        "per",
        "for",
        "yes",
        "has",
        "was",
        "it",
    ]
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in"}
_RELATIONS |= {"equiv": "=", "approx": "~", "to": "to", "rightarrow": "to", "mapsto": "to"}
_CALCULUS = frozenset(
    [
        "int",
        "iint",
        "oint",
        "sum",
        "prod",
        "lim",
        "partial",
        "mathrm",
        "pmod",
        "mod",
        "bmod",
        "cdots",
        "prime",
        "nabla",
        "oplus",
        "otimes",
        "implies",
        "forall",
        "exists",
        "neg",
        "land",
        "lor",
    ]
)
_OPEN = {"(": ")", "[": "]"}
_TOKEN = re.compile(
    r"(?P<number>\d+\.?\d*|\.\d+)(?P<repeating>\\repeating\{\d+\})?"
    r"|\\begin\{(?P<begin>[a-zA-Z*]+)\}|\\end\{(?P<end>[a-zA-Z*]+)\}"
    r"|(?P<row>\\\\)|\\(?P<command>[A-Za-z]+)|\\(?P<brace>[{}|])"
    r"|(?P<letters>[A-Za-z]+)|(?P<symbol>[-+*/^_=<>!(){}\[\],;:|&%'])|(?P<space>\s+)"
)


@dataclass(frozen=True)
class _Token:
    kind: str  # number, name, symbol, command, word, begin, end
    text: str
    spaced: bool  # whether a space comes before
    value: Node | None = None


def parse(text: str) -> Node:
    """The tree of an answer.

    Raises:
        Unreadable: the text is not (only) an answer.
    """
    return _Parser(_join_thousands(text)).answer()


def has_words(text: str) -> bool:
    """Whether the text has a word that is no mathematics."""
    try:
        return any(token.kind == "word" for token in _tokens(text))
    except Unreadable:
        return True


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)(?!,\d)")


def _join_thousands(text: str) -> str:
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


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at, spaced = 0, False
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise Unreadable(text[at : at + 1])
        at = match.end()
        if match["space"]:
            spaced = True
            continue
        tokens += _classify(match, spaced)
        spaced = False
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("long")
    return tokens


def _classify(match: re.Match, spaced: bool) -> list[_Token]:
    if match["number"]:
        return [_Token("number", match["number"], spaced, _number(match))]
    for kind in ("begin", "end", "command", "symbol"):
        if match[kind]:
            return [_Token(kind, match[kind], spaced)]
    if match["row"]:
        return [_Token("symbol", "\\\\", spaced)]
    if match["brace"]:
        return [_Token("command", match["brace"], spaced)]
    letters = match["letters"]
    lower = letters if letters in FUNCTIONS or letters in CONSTANTS else letters.lower()
    if lower in ("sqrt", "cbrt", "infinity", "inf", "pi", "oo", "abs", "theta", "alpha", "beta"):
        return [_Token("command", lower, spaced)]
    if lower in FUNCTIONS and lower not in ("max", "min", "arg", "det"):
        return [_Token("command", lower, spaced)]
    if (lower in _WORDS and len(letters) > 1) or (len(letters) > 3 and len(set(letters)) > 2):
        if not re.fullmatch(r"[xyzabcnkmpqrst]{4}|[A-Z]{4,5}", letters):
            return [_Token("word", lower, spaced)]
    return [_Token("name", letter, spaced and n == 0) for n, letter in enumerate(letters)]


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


class _Parser:
    def __init__(self, text: str):
        self._tokens = _tokens(text)
        self._at = 0
        self._depth = 0
        self._bars = 0

    def answer(self) -> Node:
        node = self._list()
        if self._at < len(self._tokens):
            self._refuse()
        return node

    # Tokens.

    def _peek(self, ahead: int = 0) -> _Token:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else _Token("end of text", "", False)

    def _is(self, *texts: str, kind: str = "symbol") -> bool:
        token = self._peek()
        return token.kind == kind and token.text in texts

    def _command(self, *names: str) -> bool:
        return self._is(*names, kind="command")

    def _take(self) -> _Token:
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

    # Lists, relations, sets.

    def _list(self) -> Node:
        items, connectives = [self._relation()], set()
        while self._is(",", ";") or self._is("and", "or", kind="word"):
            connectives.add(self._take().text)
            if self._is("and", "or", kind="word"):  # `1, 2, and 3`
                connectives.add(self._take().text)
            if self._peek().kind == "end of text":
                break
            items.append(self._relation())
        if len(items) == 1:
            return items[0]
        kind = next((c for c in ("or", "and", ";") if c in connectives), ",")
        return Node("list", (kind, tuple(items)))

    def _relation(self) -> Node:
        terms, operators = [self._union()], []
        while (token := self._peek()).kind in ("symbol", "command") and token.text in _RELATIONS:
            operators.append(_RELATIONS[self._take().text])
            terms.append(self._union())
        if self._is(":") and not operators and self._bars == 0:
            self._take()
            terms.append(self._union())
            while self._is(":"):
                self._take()
                terms.append(self._union())
            if self._peek().kind in ("symbol", "command") and self._peek().text in _RELATIONS:
                self._refuse()
            return Node("ratio", tuple(terms))
        return Node("chain", (tuple(operators), tuple(terms))) if operators else terms[0]

    def _union(self) -> Node:
        node = self._sum()
        while self._command("cup", "cap", "setminus"):
            op = {"cup": "cup", "cap": "cap", "setminus": "minus"}[self._take().text]
            node = Node(op, (node, self._sum()))
        return node

    # Sums, products, powers.

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("deep")
        node = self._signed()
        while self._is("+", "-") or self._command("pm", "mp"):
            op = self._take().text
            right = self._product()
            if op == "-":
                node = Node("+", (node, Node("neg", (right,))))
            else:
                node = Node(op, (node, right))
        self._depth -= 1
        return node

    def _signed(self) -> Node:
        signs = []
        while self._is("+", "-") or self._command("pm", "mp"):
            signs.append(self._take().text)
            if len(signs) > 4:
                self._refuse()
        node = self._product()
        for sign in reversed(signs):
            if sign == "-":
                node = Node("neg", (node,))
            elif sign != "+":
                node = Node(sign, (Node("num", (Fraction(0), 0)), node))
        return node

    def _product(self, argument: bool = False) -> Node:
        """Factors; as a function's `argument` without brackets it ends before another function."""
        node = self._power()
        while True:
            if self._is("*", "/") and not argument:
                op = self._take().text
                negative = False
                while self._is("-", "+"):
                    negative ^= self._take().text == "-"
                right = self._power()
                right = Node("neg", (right,)) if negative else right
                node = Node(op, (node, right))
            elif self._starts_factor(argument):
                before, after = self._tokens[self._at - 1], self._peek()
                if after.kind == "number" and before.kind == "number":
                    self._refuse()  # `1 2` is no product
                node = Node("*", (node, self._power()))
            else:
                return node

    def _starts_factor(self, argument: bool) -> bool:
        token = self._peek()
        if token.kind == "symbol":
            return token.text in ("(", "[", "{") or (token.text == "|" and self._bars == 0)
        if token.kind == "command":
            if token.text in FUNCTIONS:
                return not argument
            return token.text in ("frac", "sqrt", "cbrt", "abs", "binom", "lfloor", "lceil",
                                  "angle", "triangle", "{", "langle", "infty", "pi", "overline",
                                  "mathbb") or token.text in _GREEK  # fmt: skip
        return token.kind in ("number", "name", "begin")

    def _power(self) -> Node:
        node = self._base()
        while True:
            if self._is("^"):
                self._take()
                node = Node("^", (node, self._argument(signed=True)))
            elif self._is("!"):
                self._take()
                node = Node("!", (node,))
            elif self._is("%"):
                self._take()
                node = Node("percent", (node,))
            elif self._command("degree"):
                self._take()
                node = Node("degree", (node,))
            elif self._is("'") and node.op == "name":
                self._take()
                node = Node("name", (node.args[0] + "'",))
            else:
                return node

    def _argument(self, signed: bool = False) -> Node:
        """What a command or `^` applies to: a braced group or one token."""
        if self._is("{"):
            self._take()
            node = self._sum()
            self._expect("}")
            return node
        if signed and self._is("-", "+"):
            negative = self._take().text == "-"
            node = self._argument()
            return Node("neg", (node,)) if negative else node
        token = self._peek()
        if token.kind == "number" and len(token.text) > 1 and self._tex_digits():
            first, rest = token.text[0], token.text[1:]
            self._tokens[self._at] = _Token("number", rest, False, _digits(rest))
            return _digits(first)
        return self._base()

    def _tex_digits(self) -> bool:
        """Whether `\\frac12` takes one digit here; `x^12`, as plain text writes it, takes both."""
        before = self._tokens[self._at - 1]
        return before.text != "^" and self._peek().text.isdigit()

    # Operands.

    def _base(self) -> Node:
        token = self._take()
        if token.kind == "number":
            return self._numeral(token)
        if token.kind == "name":
            return self._applied(token.text) or self._name(token.text)
        if token.kind == "begin":
            return self._matrix(token.text)
        if token.kind == "symbol" and token.text in "([":
            return self._group(token.text)
        if token.kind == "symbol" and token.text == "{":
            return self._braced("symbol")
        if token.kind == "symbol" and token.text == "|":
            return self._absolute()
        if token.kind == "command":
            return self._of_command(token.text)
        self._at -= 1
        self._refuse()

    def _numeral(self, token: _Token) -> Node:
        if self._is("_") and token.text.isdigit():
            self._take()
            return Node("based", (token.text, self._argument()))
        if not token.text.isdigit():
            return token.value
        start, fraction = self._at, None
        if self._command("frac"):
            self._take()
            fraction = (self._argument(), self._argument())
        elif self._peek().kind == "number" and self._peek().spaced and self._peek(1).text == "/":
            over = self._take()
            self._take()
            fraction = (over.value, self._take().value)
        if fraction and all(n and n.op == "num" and n.args[1] == 0 for n in fraction):
            over, under = (n.args[0] for n in fraction)
            if 0 < over < under:
                return Node("num", (token.value.args[0] + over / under, None))
        self._at = start
        return token.value

    def _name(self, letter: str) -> Node:
        if self._is("_"):
            self._take()
            start = self._at
            if self._is("{"):
                depth = 0
                while True:
                    token = self._take()
                    depth += {"{": 1, "}": -1}.get(token.text, 0)
                    if depth == 0:
                        break
                    if token.kind == "end of text":
                        self._refuse()
            else:
                self._take()
            low = "".join(t.text for t in self._tokens[start : self._at] if t.text not in "{}")
            return Node("name", (f"{letter}_{low}",))
        return Node("name", (CONSTANTS.get(letter, letter),))

    def _applied(self, letter: str) -> Node | None:
        """`f(x)`; other letters before a bracket are factors."""
        if letter not in "fgh" or not self._is("(") or self._peek().spaced:
            return None
        self._take()
        return Node("call", (letter + "()", None, self._group("(")))

    def _group(self, opening: str) -> Node:
        if self._is(")", "]"):
            self._refuse()
        bars, self._bars = self._bars, 0
        inner = self._list()
        self._bars = bars
        if not self._is(")", "]"):
            self._refuse()
        closing = self._take().text
        if inner.op == "list" and inner.args[0] in (",", ";"):
            return Node("group", (opening, closing, inner.args[1]))
        if closing != _OPEN[opening]:
            self._refuse()
        return Node("group", ("[", "]", (inner,))) if inner.op == "group" else inner

    def _braced(self, kind: str) -> Node:
        """A set, or in bare braces (`kind` "symbol") a single thing, which they only group."""
        if self._is("}", kind=kind):
            self._take()
            return Node("set", ())
        bars, self._bars = self._bars, 1
        inner = self._list()
        is_condition = self._is("|", ":")  # {x : condition}
        if is_condition:
            self._take()
            inner = self._list()
        self._bars = bars
        self._expect("}", kind=kind)
        if inner.op == "list" and inner.args[0] == ",":
            return Node("set", inner.args[1])
        return inner if kind == "symbol" or is_condition else Node("set", (inner,))

    def _absolute(self) -> Node:
        self._bars += 1
        inner = self._sum()
        self._expect("|")
        self._bars -= 1
        return Node("abs", (inner,))

    def _of_command(self, name: str) -> Node:
        if name == "frac":
            return Node("/", (self._argument(), self._argument()))
        if name == "binom":
            return Node("call", ("binom", self._argument(), self._argument()))
        if name in ("sqrt", "cbrt"):
            index = _digits("3" if name == "cbrt" else "2")
            if self._is("["):
                self._take()
                index = self._sum()
                self._expect("]")
            return Node("root", (self._argument(), index))
        if name in FUNCTIONS:
            return self._call(name)
        if name in CONSTANTS:
            return Node("name", (CONSTANTS[name],))
        if name in ("angle", "triangle"):
            return self._power()
        if name == "overline":
            return self._argument()
        if name == "{":
            return self._braced("command")
        if name in ("lfloor", "lceil"):
            inner = self._sum()
            self._expect("r" + name[1:], "command")
            return Node("call", (name[1:], None, inner))
        if name == "abs":
            return Node("abs", (self._argument(),))
        if name == "langle":
            inner = self._list()
            self._expect("rangle", "command")
            return Node("group", ("(", ")", inner.args[1] if inner.op == "list" else (inner,)))
        if name == "emptyset":
            return Node("set", ())
        if name == "mathbb":
            return Node("name", ("set " + _letters(self._argument()),))
        if name in _GREEK:
            return self._name("\\" + name)
        self._at -= 1
        self._refuse()

    def _call(self, name: str) -> Node:
        base = power = None
        while self._is("_", "^"):
            if self._take().text == "_":
                base = self._argument()
            else:
                power = self._argument(signed=True)
        if self._is("(", "[", "{"):
            argument = self._base()
            if argument.op == "group" and name not in ("max", "min", "gcd", "lcm"):
                self._refuse()
        else:
            argument = self._product(argument=True)
        minus_one = Node("neg", (_digits("1"),))
        if power == minus_one and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            name, power = "arc" + name, None
        node = Node("call", (name, base, argument))
        return node if power is None else Node("^", (node, power))

    def _matrix(self, kind: str) -> Node:
        if kind == "array":
            self._argument()
        rows: list[list[Node]] = [[]]
        while True:
            if self._peek().kind == "end":
                self._take()
                break
            if self._is("\\\\"):
                self._take()
                rows.append([])
            elif self._is("&"):
                self._take()
            else:
                rows[-1].append(self._relation())
        return Node("matrix", (kind, tuple(tuple(row) for row in rows if row)))


def _digits(text: str) -> Node:
    return Node("num", (Fraction(text), 0))


def _letters(node: Node) -> str:
    if node.op != "name":
        raise Unreadable("set")
    return node.args[0]
