"""Plain data between the process that holds the tests and the one that runs the program: JSON.

Only values of exact base types are rebuilt: a subclass arrives as its base, so that an overloaded
`__eq__` stays behind. What is not plain data crosses as a reference, by the caller's `refer`.
Also used by the parent. No pickle: nothing that arrives runs.
"""

from __future__ import annotations

import builtins
import math
import sys
from collections import Counter, OrderedDict, deque

PLAIN = (str, bool, type(None))
SEQUENCES = (tuple, list, set, frozenset, deque)
# Rebuilt from the text that str() or isoformat() gives.
TEXTUAL = {"decimal": ("Decimal",), "fractions": ("Fraction",), "datetime": ("datetime", "date")}


def encode(value, refer):
    """The JSON form of `value`: itself where JSON has it, else {tag: content}.

    Args:
        refer: called with what is no plain data; gives its JSON form or raises TypeError.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if isinstance(value, int):
        value = int.__pos__(value)
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if isinstance(value, float):
        value = float.__pos__(value)
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": value.decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, refer), encode(value.imag, refer)]}
    if isinstance(value, range):
        return {"range": [encode(part, refer) for part in (value.start, value.stop, value.step)]}
    for base in SEQUENCES:
        if isinstance(value, base):
            items = [encode(item, refer) for item in base.__iter__(value)]
            return items if base is list else {base.__name__: items}
    if isinstance(value, dict):
        name = next((c.__name__ for c in (Counter, OrderedDict) if isinstance(value, c)), "dict")
        pairs = [[encode(k, refer), encode(v, refer)] for k, v in dict.items(value)]
        return {name: pairs}
    if kind in (type({}.keys()), type({}.values()), type({}.items())):
        return {kind.__name__: [encode(item, refer) for item in value]}
    module = kind.__module__
    if module in TEXTUAL and kind.__name__ in TEXTUAL[module]:
        text = value.isoformat() if module == "datetime" else str(value)
        return {"text": [module, kind.__name__, text]}
    if module == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    if kind is type and getattr(builtins, value.__name__, None) is value:
        return {"builtin": value.__name__}
    return refer(value)


def decode(data, resolve):
    """The value of a JSON form; ValueError, TypeError, KeyError or RecursionError for any other.

    Args:
        resolve: called with the content of {"ref": content}.
    """
    if type(data) is list:
        return [decode(item, resolve) for item in data]
    if type(data) is not dict:
        return data
    ((tag, content),) = data.items()
    if tag in _REBUILD:
        return _REBUILD[tag](content)
    if tag == "text":
        return _from_text(*content)
    if tag == "ref":
        return resolve(content)
    items = [decode(item, resolve) for item in content]
    return _COLLECT[tag](items)


_REBUILD = {
    "int": lambda text: int(text, 16),
    "float": lambda text: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
    "bytes": lambda text: text.encode("latin-1"),
    "bytearray": lambda text: bytearray(text.encode("latin-1")),
    "builtin": lambda name: _builtin_type(name),
}
_COLLECT = {
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "dict": dict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "OrderedDict": OrderedDict,
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda pairs: dict(pairs).items(),
}


def _builtin_type(name):
    kind = getattr(builtins, name)
    if type(kind) is not type:
        raise ValueError(name)
    return kind


def _from_text(module, name, text):
    if name not in TEXTUAL[module]:
        raise ValueError(name)
    __import__(module)
    kind = getattr(sys.modules[module], name)
    return kind.fromisoformat(text) if module == "datetime" else kind(text)


def refuse(value):
    """`refer` and `resolve` where only plain data may pass."""
    raise TypeError(f"{type(value).__name__} is no plain data")
