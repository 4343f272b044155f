r"""Whether two answers mean the same: numbers, expressions, lists, sets, intervals, matrices, ...

`equivalent` answers True or False, or None where the notation is beyond this grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from r1kern.rewards.equivalence import value as values
from r1kern.rewards.equivalence.read import Reading, read, try_parse, whole
from r1kern.rewards.equivalence.region import Region, is_region, region
from r1kern.rewards.equivalence.text import choice, normalise, same_text, words
from r1kern.rewards.equivalence.tokens import Node

MAX_ITEMS = 64


def equivalent(prediction: str, gold: str) -> bool | None:
    """Whether the answers are equivalent; None if that takes notation that is not read here."""
    prediction, gold = normalise(prediction), normalise(gold)
    if not prediction or not gold:
        return False
    if same_text(prediction, gold):
        return True
    letters = choice(prediction), choice(gold)
    if all(letters):
        return letters[0] == letters[1]
    left, right = read(prediction), read(gold)
    if left.unknown or right.unknown:
        return None
    if left.node is None or right.node is None:
        return words(prediction) == words(gold) != ""
    if _quantities(left, right):
        return True
    # A unit's letter may be a variable's name too.
    whole = [try_parse(text) for text in (prediction, gold)]
    return all(whole) and (left.unit is None) == (right.unit is None) and same(*whole)


def _result(node: Node) -> Node:
    """The last member of `3 + 4 = 7`, the 5 of `x = 5`; else the node."""
    if node.op != "chain" or set(node.args[0]) != {"="}:
        return node
    terms = node.args[1]
    if _is_label(terms[0], terms[-1]):
        return terms[-1]
    if terms[-1].op == "name" and len(terms) == 2 and not values.variables(terms[0]):
        return terms[0]
    if len(terms) > 2 and values.variables(terms[0]):
        terms = terms[1:]  # a + b = 1 + 2 = 3
    if any(values.variables(term) for term in terms):
        return node
    return terms[-1] if all(same(a, b) for a, b in pairwise(terms)) else node


def _is_label(left: Node, right: Node) -> bool:
    """Whether `left = right` names `right`: a variable, `AB`, `f(x)` or `(x, y)`."""
    if left.op == "group":
        return right.op == "group" and all(item.op == "name" for item in left.args[2])
    if left.op == "call":
        return left.args[0].endswith("()")
    if not _only_names(left):
        return False
    return _is_application(left) or not values.variables(left) & values.variables(right)


def _only_names(node: Node) -> bool:
    return (node.op == "name" and bool(values.variables(node))) or (
        node.op == "*" and all(map(_only_names, node.args))
    )


def _is_application(node: Node) -> bool:
    """Whether a product of names is `P(x)`: the parser reads it as one."""
    return (
        node.op == "*" and node.args[0].op == "name" and node.args[0].args[0] in tuple("pqFGHPQTS")
    )


# Quantities.


def _quantities(left: Reading, right: Reading) -> bool:
    if left.unit and right.unit:
        return _both_units(left, right)
    unit = left.unit or right.unit
    if unit is None:
        return same(left.node, right.node)
    with_unit, without = (left, right) if left.unit else (right, left)
    if unit[0] == "percent":
        hundredth = Node("/", (with_unit.node, whole("100")))
        return same(with_unit.node, without.node) or same(hundredth, without.node)
    if "based" in (left.node.op, right.node.op):
        return False
    return same(left.node, right.node)


def _both_units(left: Reading, right: Reading) -> bool:
    (dimension, size), (gold_dimension, gold_size) = left.unit, right.unit
    if dimension != gold_dimension:
        return "unit" in (dimension, gold_dimension) and same(left.node, right.node)
    if size == gold_size:
        return same(left.node, right.node)
    scaled = [
        Node("*", (r.node, Node("num", (Fraction(repr(s)), None))))
        for r, s in ((left, size), (right, gold_size))
    ]
    return same(*scaled)


# Structures.


def same(left: Node, right: Node) -> bool:
    """Whether two trees mean the same."""
    if _is_equation(left) and _is_equation(right):
        return _same_relation(left, right)
    left, right = _plain(left), _plain(right)
    if left == right:
        return True
    if is_region(left) or is_region(right):
        return _same_region(left, right)
    if left.op == "chain" or right.op == "chain":
        return left.op == right.op and _same_relation(left, right)
    if left.op in ("list", "set") or right.op in ("list", "set"):
        return _same_collection(left, right)
    if left.op == "matrix" or right.op == "matrix":
        return _same_matrix(left, right)
    if left.op == "group" or right.op == "group":
        return left.op == right.op and _same_group(left.args, right.args)
    if left.op == "ratio" or right.op == "ratio":
        return _same_ratio(left, right)
    if right.op == "based" and left.op != "based":
        return False
    return values.equal(left, right)


def _plain(node: Node) -> Node:
    """Without labels (`x = 5`), with each of the values of `\\pm` in a list."""
    node = _result(node)
    if node.op == "chain" and node.args[0] == ("in",):
        node = node.args[1][1] if node.args[1][1].op in ("set", "name") else node
    if node.op in ("list", "set"):
        kind, items = (node.args[0], node.args[1]) if node.op == "list" else (None, node.args)
        items = tuple(choice for item in items for choice in _choices(_result(item)))
        if kind and _names_differ(node.args[1]):
            return Node("group", ("(", ")", items))
        return Node(node.op, (kind, items) if kind else items)
    if node.op == "group" and node.args[0] == "[" and all(_is_row(i) for i in node.args[2]):
        return Node("matrix", ("bmatrix", tuple(i.args[2] for i in node.args[2])))
    if node.op == "matrix":
        return node
    if node.op == "*" and (scaled := _scaled_matrix(node)):
        return scaled
    choices = _choices(node)
    return node if len(choices) == 1 else Node("list", (",", choices))


def _is_row(node: Node) -> bool:
    return node.op == "group" and node.args[:2] == ("[", "]")


def _scaled_matrix(node: Node) -> Node | None:
    factor, matrix = node.args
    if matrix.op != "matrix" or matrix.args[0] == "vmatrix":
        return None
    rows = tuple(tuple(Node("*", (factor, cell)) for cell in row) for row in matrix.args[1])
    return Node("matrix", (matrix.args[0], rows))


def _names_differ(items: Sequence[Node]) -> bool:
    """Whether a list is `x = 1, y = 2`, a point in the order of its variables' names."""
    names = [
        item.args[1][0].args[0]
        for item in items
        if item.op == "chain" and item.args[0] == ("=",) and item.args[1][0].op == "name"
    ]
    stems = {name.partition("_")[0] for name in names}  # x_1, x_2 are the roots of one equation
    return len(stems) == len(names) == len(items) and names == sorted(names)


def _choices(node: Node) -> tuple[Node, ...]:
    if not _has_sign(node):
        return (node,)
    return tuple(_signed(node, upper) for upper in (True, False))


def _has_sign(part: object) -> bool:
    if isinstance(part, tuple):
        return any(map(_has_sign, part))
    return isinstance(part, Node) and (part.op in ("pm", "mp") or _has_sign(part.args))


def _signed(part, upper: bool):
    if isinstance(part, tuple):
        return tuple(_signed(inner, upper) for inner in part)
    if not isinstance(part, Node):
        return part
    args = _signed(part.args, upper)
    if part.op not in ("pm", "mp"):
        return Node(part.op, args)
    plus = (part.op == "pm") == upper
    return Node("+", (args[0], args[1] if plus else Node("neg", (args[1],))))


def _same_collection(left: Node, right: Node) -> bool:
    """Sets and lists, whatever the order; a single thing is the set or list of itself."""
    gold, found = _items(right), _items(left)
    if left.op == "set" or right.op == "set":
        gold, found = _distinct(gold), _distinct(found)
    if len(gold) != len(found) or len(gold) > MAX_ITEMS:
        return False
    rest = list(gold)
    for item in found:
        at = next((n for n, other in enumerate(rest) if same(item, other)), None)
        if at is None:
            return False
        del rest[at]
    return True


def _items(node: Node) -> Sequence[Node]:
    return {"list": lambda: node.args[1], "set": lambda: node.args}.get(node.op, lambda: (node,))()


def _distinct(items: Sequence[Node]) -> list[Node]:
    distinct: list[Node] = []
    for item in items[: MAX_ITEMS + 1]:
        if not any(same(item, other) for other in distinct):
            distinct.append(item)
    return distinct


def _same_group(left: tuple, right: tuple) -> bool:
    (opening, closing, items), (gold_opening, gold_closing, gold) = left, right
    if len(items) != len(gold):
        return False
    if (opening, closing) != (gold_opening, gold_closing) and (
        len(gold) == 2 or "time" in (opening, gold_opening)
    ):
        return False
    return all(same(a, b) for a, b in zip(items, gold, strict=True))


def _same_matrix(left: Node, right: Node) -> bool:
    shapes = [_rows(node) for node in (left, right)]
    if None in shapes:
        numbers = [_determinant(node) for node in (left, right)]
        return None not in numbers and values.equal(*numbers)
    rows, gold = shapes
    if [len(row) for row in rows] != [len(row) for row in gold]:
        return False
    cells = zip((c for row in rows for c in row), (c for row in gold for c in row), strict=True)
    return all(same(a, b) for a, b in cells)


def _rows(node: Node) -> tuple | None:
    """A matrix's rows; a point is a column."""
    if node.op == "matrix" and node.args[0] not in ("vmatrix", "Vmatrix"):
        return node.args[1]
    if node.op == "group" and node.args[:2] == ("(", ")"):
        return tuple((item,) for item in node.args[2])
    return None


def _determinant(node: Node) -> Node | None:
    if node.op != "matrix":
        return None if node.op in ("group", "list", "set", "chain") else node
    rows = node.args[1]
    if node.args[0] != "vmatrix" or len(rows) > 5 or any(len(row) != len(rows) for row in rows):
        return None
    return _expanded(rows)


def _expanded(rows: tuple) -> Node:
    if len(rows) == 1:
        return rows[0][0]
    total = whole("0")
    for column, cell in enumerate(rows[0]):
        minor = tuple(row[:column] + row[column + 1 :] for row in rows[1:])
        term = Node("*", (cell, _expanded(minor)))
        total = Node("+", (total, Node("neg", (term,)) if column % 2 else term))
    return total


def _same_ratio(left: Node, right: Node) -> bool:
    parts = [node.args if node.op == "ratio" else None for node in (left, right)]
    if None not in parts:
        if len(parts[0]) != len(parts[1]):
            return False
        pairs = list(zip(*parts, strict=True))
        return all(
            values.equal(Node("*", (a, d)), Node("*", (c, b))) for (a, b), (c, d) in pairwise(pairs)
        )
    return all(p is None or len(p) == 2 for p in parts) and values.equal(left, right)


# Relations and regions.


def _is_equation(node: Node) -> bool:
    return node.op == "chain" and node.args[0] == ("=",) and bool(values.variables(node))


def _same_relation(left: Node, right: Node) -> bool:
    """Whether two equations or inequalities differ by a constant factor of their two sides."""
    if left.args[0] == right.args[0] and left.args[1][0] == right.args[1][0]:
        return all(map(same, left.args[1], right.args[1]))
    if len(left.args[0]) != 1 or len(right.args[0]) != 1:
        ops = left.args[0] == right.args[0]
        return ops and all(same(a, b) for a, b in zip(left.args[1], right.args[1], strict=True))
    (op,), (gold_op,) = left.args[0], right.args[0]
    if op in ("in", "~", "to") or gold_op in ("in", "~", "to"):
        return op == gold_op and all(map(same, left.args[1], right.args[1]))
    sides = [Node("+", (n.args[1][0], Node("neg", (n.args[1][1],)))) for n in (left, right)]
    names = sorted(values.variables(sides[0]) | values.variables(sides[1]))
    ratios: list = []

    def proportional(a: values.Value, b: values.Value) -> bool:
        if values.same_value(a, Fraction(0)) or values.same_value(b, Fraction(0)):
            return values.same_value(a, b)
        ratios.append(values.number(a) / values.number(b))
        return values.same_value(ratios[0], ratios[-1])

    if not names or not values.all_agree(*sides, names, proportional) or not ratios:
        return False
    flipped = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    if op in ("=", "!="):
        return op == gold_op
    ratio = values.real(ratios[0])
    return (op if ratio > 0 else flipped[op]) == gold_op


def _same_region(left: Node, right: Node) -> bool:
    regions = [region(node) for node in (left, right)]
    if None not in regions:
        return _matching(*regions)
    if left.op == right.op == "group":
        return _same_group(left.args, right.args)
    return left.op == right.op == "chain" and _same_relation(left, right)


def _matching(left: Region, right: Region) -> bool:
    named = left.variable is None or right.variable is None or left.variable == right.variable
    return named and left.pieces == right.pieces
