"""Values of parsed expressions, exact where rational, and their equality.

Two expressions are equal if they agree at every tried point where both are real. Sizes are bounded
before anything is computed, so that no expression takes long.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction

from mpmath import mp

from r1kern.rewards.equivalence.tokens import Node

DIGITS = 50
TOLERANCE = mp.mpf(10) ** -30
MAX_BITS = 1 << 18  # of an exact number
MAX_EXPONENT = 1e6  # natural logarithm of the largest rounded number
MAX_FACTORIAL = 3000
POINTS = 14
ENOUGH_POINTS = 4
ROUNDED_DIGITS = 6  # a decimal of this many places stands for what it rounds

mp.dps = DIGITS
Value = Fraction | mp.mpf | mp.mpc


class Point(dict[str, Fraction]):
    """Values of variables; `left_the_reals` once an expression had a part that is not real."""

    left_the_reals = False


class Undefined(Exception):
    """No value: a division by zero, or a size out of bounds."""


def equal(left: Node, right: Node) -> bool:
    """Whether two scalar expressions have the same value, for all values of their variables."""
    names = sorted(variables(left) | variables(right))
    if len(names) > 12:
        return False
    if not names:
        try:
            a, b = value(left, Point()), value(right, Point())
        except Undefined:
            return False
        return same_value(a, b) or _rounded(left, right, a, b) or _rounded(right, left, b, a)
    return all_agree(left, right, names, same_value)


def all_agree(left: Node, right: Node, names: list[str], agree) -> bool:
    """Whether `agree(value of left, value of right)` at the points where both have real values.

    Where fewer than `ENOUGH_POINTS` are real, at the complex-valued points.
    """
    real, other = [], []
    for point in _points(names):
        try:
            a, b = value(left, point), value(right, point)
        except Undefined:
            continue
        (other if point.left_the_reals else real).append((a, b))
    pairs = real if len(real) >= ENOUGH_POINTS else real + other
    return len(pairs) >= ENOUGH_POINTS and all(agree(a, b) for a, b in pairs)


def _points(names: list[str]) -> Iterator[Point]:
    """Rational points, the same for the same names; half of them with positive coordinates."""
    drawn = random.Random("/".join(names))
    for i in range(POINTS):
        scale = (1, 3, 10)[i % 3]
        low = 1 if i % 2 else -100
        yield Point(
            (name, Fraction(drawn.randint(low, 100) * scale, 101) + Fraction(1, 97))
            for name in names
        )


def same_value(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = number(a), number(b)
    if not (mp.isfinite(a) and mp.isfinite(b)):
        return a == b
    return abs(a - b) <= TOLERANCE * max(1, abs(a), abs(b))


def _rounded(decimal: Node, exact: Node, a: Value, b: Value) -> bool:
    """Whether `decimal`, written to six places or more, is `exact` rounded or cut off there."""
    if decimal.op == "neg":
        decimal = decimal.args[0]
    if decimal.op != "num" or not decimal.args[1] or decimal.args[1] < ROUNDED_DIGITS:
        return False
    places = decimal.args[1]
    if exact.op == "num" and exact.args[1] is not None and exact.args[1] < places:
        return False
    significant = len(
        str(abs(decimal.args[0].numerator * 10**places // decimal.args[0].denominator))
    )
    if significant < ROUNDED_DIGITS or not is_real(b):
        return False
    return abs(number(a) - number(b)) < mp.mpf(10) ** -places


def variables(node: Node) -> set[str]:
    """The names in an expression that are no constants."""
    if node.op == "call" and node.args[0].endswith("()"):
        return {node.args[0]} | variables(node.args[2])
    if node.op == "name":
        return set() if node.args[0] in ("pi", "e", "i", "inf") else {node.args[0]}
    found: set[str] = set()
    for part in node.args:
        for inner in part if isinstance(part, tuple) else (part,):
            if isinstance(inner, Node):
                found |= variables(inner)
            elif isinstance(inner, tuple):
                for cell in inner:
                    found |= variables(cell) if isinstance(cell, Node) else set()
    return found


def number(a: Value) -> mp.mpf | mp.mpc:
    return mp.mpf(a.numerator) / a.denominator if isinstance(a, Fraction) else a


def is_real(a: Value) -> bool:
    if isinstance(a, mp.mpc):
        return abs(a.imag) <= TOLERANCE * max(1, abs(a.real))
    return True


def real(a: Value) -> Fraction | mp.mpf:
    """Raises Undefined unless the value is real."""
    if not is_real(a):
        raise Undefined
    return a.real if isinstance(a, mp.mpc) else a


def value(node: Node, at: Point) -> Value:
    """The value where the variables are as in `at`.

    Raises:
        Undefined: there is none, it is too large to compute, or the node is no scalar.
    """
    try:
        result = _value(node, at)
    except (ZeroDivisionError, ValueError, OverflowError, mp.NoConvergence):
        raise Undefined from None
    if isinstance(result, Fraction):
        _bound(result)
    elif mp.isnan(result):
        raise Undefined
    elif not is_real(result):
        at.left_the_reals = True
    return result


def _bound(a: Fraction) -> None:
    if a.numerator.bit_length() + a.denominator.bit_length() > MAX_BITS:
        raise Undefined


def _value(node: Node, at: Point) -> Value:
    op, args = node.op, node.args
    if op == "num":
        return args[0]
    if op == "name":
        return _named(args[0], at)
    if op == "call":
        name, base, argument = args
        if name.endswith("()"):
            return _unknown_function(_named(name, at), argument, at)
        if base is not None:
            base = value(base, at)
        if argument.op == "group":
            return _of_many(name, [value(item, at) for item in argument.args[2]])
        return _call(name, base, value(argument, at))
    if op == "based":
        return based(node)
    if op not in _OPERATIONS:
        raise Undefined
    return _OPERATIONS[op](*(value(arg, at) for arg in args))


def _named(name: str, at: Point) -> Value:
    constants = {"pi": mp.pi, "e": mp.e, "inf": mp.inf, "i": mp.j}
    if name in constants:
        return +constants[name]
    if name not in at:
        raise Undefined
    return at[name]


def _unknown_function(seed: Fraction, argument: Node, at: Point) -> Value:
    """Any function that satisfies no identity will do for `f`."""
    arguments = argument.args[2] if argument.op == "group" else (argument,)
    total = number(seed)
    for argument in arguments:
        a = number(value(argument, at))
        _bound_power(mp.e, a)
        total = mp.cos(total + a) + total * mp.exp(-a * a / 9)
    return total


def based(node: Node) -> Fraction:
    digits, base = node.args
    if base.op != "num" or not 2 <= base.args[0] <= 36:
        raise Undefined
    return Fraction(int(digits, int(base.args[0])))


def _add(a: Value, b: Value) -> Value:
    return a + b if type(a) is type(b) else number(a) + number(b)


def _multiply(a: Value, b: Value) -> Value:
    return a * b if type(a) is type(b) else number(a) * number(b)


def _divide(a: Value, b: Value) -> Value:
    return a / b if type(a) is type(b) else number(a) / number(b)


def _power(a: Value, b: Value) -> Value:
    if isinstance(b, Fraction) and b.denominator == 1:
        if isinstance(a, Fraction):
            bits = max(a.numerator.bit_length(), a.denominator.bit_length())
            if bits * abs(b.numerator) > MAX_BITS and abs(a) != 1 and a != 0:
                raise Undefined
            return a**b.numerator
        _bound_power(a, b)
        return a**b.numerator
    if a == 0:
        if real(b) < 0:
            raise Undefined
        return Fraction(0)
    _bound_power(a, b)
    if isinstance(b, Fraction) and b.denominator % 2 and is_real(a) and real(number(a)) < 0:
        # The real root, as schools read it.
        root = mp.power(-real(number(a)), number(b))
        return -root if b.numerator % 2 else root
    return mp.power(number(a), number(b))


def _bound_power(a: Value, b: Value) -> None:
    if not mp.isfinite(number(a)) or not mp.isfinite(number(b)):
        return
    if a == 0:
        return
    if abs(number(b)) * abs(mp.log(number(a))) > MAX_EXPONENT:
        raise Undefined


def _root(a: Value, index: Value) -> Value:
    return _power(a, _divide(Fraction(1), index))


def _factorial(a: Value) -> Value:
    a = real(a)
    if abs(a) > MAX_FACTORIAL:
        raise Undefined
    if isinstance(a, Fraction) and a.denominator == 1:
        if a < 0:
            raise Undefined
        return Fraction(math.factorial(a.numerator))
    return mp.gamma(number(a) + 1)


def _binomial(n: Value, k: Value) -> Value:
    n, k = real(n), real(k)
    if abs(n) > MAX_FACTORIAL or abs(k) > MAX_FACTORIAL:
        raise Undefined
    whole = all(isinstance(x, Fraction) and x.denominator == 1 and x >= 0 for x in (n, k))
    if whole:
        return Fraction(math.comb(n.numerator, k.numerator))
    return mp.binomial(number(n), number(k))


def _degrees(a: Value) -> Value:
    return number(a) * mp.pi / 180


_OPERATIONS = {
    "+": _add,
    "*": _multiply,
    "/": _divide,
    "^": _power,
    "root": _root,
    "!": _factorial,
    "neg": lambda a: -a,
    "abs": abs,
    "percent": lambda a: _divide(a, Fraction(100)),
    "degree": _degrees,
    "ratio": _divide,
}
_ANGLE_FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS = {
    **{name: getattr(mp, name) for name in _ANGLE_FUNCTIONS},
    **{name + "h": getattr(mp, name + "h") for name in _ANGLE_FUNCTIONS},
    **{"arc" + name: getattr(mp, "a" + name) for name in _ANGLE_FUNCTIONS},
    **{"a" + name: getattr(mp, "a" + name) for name in ("sin", "cos", "tan")},
    "exp": mp.exp, "Re": mp.re, "Im": mp.im, "sgn": mp.sign, "arg": mp.arg,
}  # fmt: skip


def _call(name: str, base: Value | None, argument: Value) -> Value:
    if name == "binom":
        return _binomial(base, argument)
    if name in ("floor", "ceil"):
        exact = real(argument)
        if not isinstance(exact, Fraction) and not mp.isfinite(exact):
            raise Undefined
        return Fraction(int((math.floor if name == "floor" else math.ceil)(exact)))
    if name in ("ln", "log", "lg"):
        return _logarithm(name, base, argument)
    if base is not None or name not in _FUNCTIONS:
        raise Undefined
    argument = number(argument)
    if mp.isfinite(argument) and abs(argument) > MAX_EXPONENT:
        raise Undefined
    return _FUNCTIONS[name](argument)


def _logarithm(name: str, base: Value | None, argument: Value) -> Value:
    if argument == 0:
        raise Undefined
    result = mp.log(number(argument))
    base = Fraction(10) if name == "lg" else base
    return result if base is None else result / mp.log(number(base))


def _of_many(name: str, values: list[Value]) -> Value:
    if name in ("max", "min"):
        return (max if name == "max" else min)(values, key=lambda a: real(number(a)))
    whole = [a.numerator for a in values if isinstance(a, Fraction) and a.denominator == 1]
    if name in ("gcd", "lcm") and len(whole) == len(values):
        return Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole))
    raise Undefined
