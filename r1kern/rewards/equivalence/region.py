"""Sets of real numbers: intervals, unions, inequalities in one variable."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mpmath import mp

from r1kern.rewards.equivalence import value as values
from r1kern.rewards.equivalence.tokens import Node

# (lower end, whether it belongs, upper end, whether it belongs); rounded so that equal ends are.
Piece = tuple[str | float, bool, str | float, bool]
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_EVERYTHING = [(-mp.inf, False, mp.inf, False)]


@dataclass(frozen=True)
class Region:
    """A union of disjoint intervals in ascending order, of the variable if one is named."""

    variable: str | None
    pieces: list[Piece]


def is_region(node: Node) -> bool:
    """Whether the notation is that of a set of real numbers, rather than of a point or a value."""
    if node.op in ("cup", "cap", "minus"):
        return True
    if node.op == "name":
        return node.args[0] == "set R"
    if node.op == "group" and len(node.args[2]) == 2 and node.args[0] in "[(":
        return node.args[:2] not in (("(", ")"), ("[", "]")) or any(map(_infinite, node.args[2]))
    if node.op == "list":
        return node.args[0] in ("or", "and") and all(map(_is_inequality, node.args[1]))
    return _is_inequality(node)


def _infinite(node: Node) -> bool:
    node = node.args[0] if node.op == "neg" else node
    return node == Node("name", ("inf",))


def _is_inequality(node: Node) -> bool:
    if node.op != "chain":
        return False
    return bool(set(node.args[0]) - {"=", "~", "to"}) and "=" not in node.args[0]


def region(node: Node) -> Region | None:
    """The real numbers that the node describes; None where its ends are no numbers."""
    try:
        variable, pieces = _region(node)
    except (values.Undefined, _NoRegion):
        return None
    return Region(variable, _merged(pieces))


class _NoRegion(Exception):
    pass


def _region(node: Node) -> tuple[str | None, list]:
    if node.op == "group" and len(node.args[2]) == 2 and node.args[0] in "[(":
        low, high = (
            values.real(values.number(values.value(n, values.Point()))) for n in node.args[2]
        )
        if low >= high and not (low == high and node.args[:2] == ("[", "]")):
            raise _NoRegion
        return None, [(low, node.args[0] == "[", high, node.args[1] == "]")]
    if node == Node("name", ("set R",)):
        return None, _EVERYTHING
    if node.op == "set":
        points = [_end(n) for n in node.args]
        return None, [(p, True, p, True) for p in sorted(points)]
    if node.op in ("cup", "cap", "minus"):
        return _combined(node.op, [_region(n) for n in node.args])
    if node.op == "+" and node.args[1].op == "neg":  # R - {0}
        return _combined("minus", [_region(node.args[0]), _region(node.args[1].args[0])])
    if node.op == "list":
        op = {"or": "cup", "and": "cap"}.get(node.args[0])
        parts = [_region(n) for n in node.args[1]]
        while op and len(parts) > 1:
            parts[:2] = [_combined(op, parts[:2])]
        if op:
            return parts[0]
    if node.op == "chain":
        return _of_chain(*node.args)
    raise _NoRegion


def _end(node: Node) -> mp.mpf:
    return values.real(values.number(values.value(node, values.Point())))


def _combined(op: str, parts: list) -> tuple[str | None, list]:
    (name, left), (other, right) = parts
    if name and other and name != other:
        raise _NoRegion
    if op == "cup":
        return name or other, left + right
    if op == "minus":
        right = _complement(_sorted(right))
    return name or other, [p for a in left for b in right if (p := _overlap(a, b))]


def _overlap(a: tuple, b: tuple) -> tuple | None:
    low, low_in = max((a[0], not a[1]), (b[0], not b[1]))
    high, high_in = min((a[2], a[3]), (b[2], b[3]))
    if low > high or (low == high and (low_in or not high_in)):
        return None
    return (low, not low_in, high, high_in)


def _complement(pieces: list) -> list:
    gaps, low, low_in = [], -mp.inf, False
    for piece in pieces:
        if low < piece[0] or (low == piece[0] and low_in and not piece[1]):
            gaps.append((low, low_in, piece[0], not piece[1]))
        low, low_in = piece[2], not piece[3]
    return gaps if low == mp.inf else [*gaps, (low, low_in, mp.inf, False)]


def _of_chain(operators: tuple, terms: tuple) -> tuple[str | None, list]:
    if operators == ("in",) and terms[0].op == "name":
        return terms[0].args[0], _region(terms[1])[1]
    names = set().union(*map(values.variables, terms))
    if len(names) != 1:
        raise _NoRegion
    (name,) = names
    pieces = _EVERYTHING
    for op, (left, right) in zip(operators, pairwise(terms), strict=True):
        half = _half_line(name, op, left, right)
        pieces = [p for a in pieces for b in half if (p := _overlap(a, b))]
    return name, pieces


def _half_line(name: str, op: str, left: Node, right: Node) -> list:
    """Where a linear relation `a x + b op c x + d` holds."""
    difference = Node("+", (left, Node("neg", (right,))))
    if op == "in":
        raise _NoRegion
    try:
        at = [
            values.value(difference, values.Point({name: x}))
            for x in map(values.Fraction, (0, 1, 2, -3))
        ]
    except values.Undefined:
        raise _NoRegion from None
    slope = values.number(at[1]) - values.number(at[0])
    linear = values.same_value(values.number(at[2]), values.number(at[0]) + 2 * slope)
    linear &= values.same_value(values.number(at[3]), values.number(at[0]) - 3 * slope)
    if not linear or not values.is_real(slope) or abs(slope) < values.TOLERANCE:
        raise _NoRegion
    slope = values.real(slope)
    end = -values.real(values.number(at[0])) / slope
    op = op if slope > 0 else _FLIPPED.get(op, op)
    return {
        "<": [(-mp.inf, False, end, False)],
        "<=": [(-mp.inf, False, end, True)],
        ">": [(end, False, mp.inf, False)],
        ">=": [(end, True, mp.inf, False)],
        "!=": [(-mp.inf, False, end, False), (end, False, mp.inf, False)],
    }[op]


def _sorted(pieces: list) -> list:
    return sorted(pieces, key=lambda piece: (piece[0], not piece[1]))


def _merged(pieces: list) -> list[Piece]:
    merged: list = []
    for low, low_in, high, high_in in _sorted(pieces):
        if merged and _touches(merged[-1], low, low_in):
            before = merged.pop()
            high, high_in = max((before[2], before[3]), (high, high_in))
            low, low_in = before[:2]
        merged.append((low, low_in, high, high_in))
    return [(mp.nstr(a, 30), b, mp.nstr(c, 30), d) for a, b, c, d in merged]


def _touches(before: tuple, low, low_in: bool) -> bool:
    return low < before[2] or (low == before[2] and (low_in or before[3]))
