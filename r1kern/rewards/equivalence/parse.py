"""A parser of answers in LaTeX or plain notation, into a tree; what it cannot read it refuses."""

from __future__ import annotations

from fractions import Fraction

from r1kern.rewards.equivalence.tokens import (
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    RELATIONS,
    Cursor,
    Node,
    Token,
    Unreadable,
    digits,
)

MAX_DEPTH = 40
_OPEN = {"(": ")", "[": "]"}


def parse(text: str) -> Node:
    """The tree of an answer.

    Raises:
        Unreadable: the text is not (only) an answer.
    """
    return _Parser(text).answer()


class _Parser(Cursor):
    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._bars = 0

    def answer(self) -> Node:
        node = self._list()
        if self._at < len(self._tokens):
            self._refuse()
        return node

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
        while (token := self._peek()).kind in ("symbol", "command") and token.text in RELATIONS:
            operators.append(RELATIONS[self._take().text])
            terms.append(self._union())
        if self._is(":") and not operators and self._bars == 0:
            self._take()
            terms.append(self._union())
            while self._is(":"):
                self._take()
                terms.append(self._union())
            if self._peek().kind in ("symbol", "command") and self._peek().text in RELATIONS:
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
                                  "mathbb") or token.text in GREEK  # fmt: skip
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
        if token.kind == "number" and len(token.text) > 1 and self._texdigits():
            first, rest = token.text[0], token.text[1:]
            self._tokens[self._at] = Token("number", rest, False, digits(rest))
            return digits(first)
        return self._base()

    def _texdigits(self) -> bool:
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
        return self._refuse()

    def _numeral(self, token: Token) -> Node:
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
            index = digits("3" if name == "cbrt" else "2")
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
        if name in GREEK:
            return self._name("\\" + name)
        self._at -= 1
        return self._refuse()

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
        minus_one = Node("neg", (digits("1"),))
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


def _letters(node: Node) -> str:
    if node.op != "name":
        raise Unreadable("set")
    return node.args[0]
