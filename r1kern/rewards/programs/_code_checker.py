"""Runs tests against a program in another sandbox; started by path, never imported.

The tests and their expected outputs are here, the program is not: its functions are `Remote`
objects that ask for a result over a pipe and get plain data. Comparing is done here alone; no
operand of a comparison is ever sent.

Standard input: one JSON object (tests). `events` (a pipe): one JSON object a line: `ready`,
`loaded`, `begin`, `end`.
"""

from __future__ import annotations

import builtins
import importlib
import json
import math
import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import _code_wire as wire

del sys.path[0]

MAX_REPLY = 32 << 20  # bytes


class ProgramEnded(BaseException):
    """The program's process is gone or no longer makes sense."""


class Link:
    """The pipes to the program."""

    def __init__(self, requests: int, replies: int):
        self.requests = os.fdopen(requests, "wb")
        self.replies = os.fdopen(replies, "rb")
        self.callbacks = []
        self.error = None  # the last exception that came from the program
        self.ended = None  # why nothing more can come, also where a test catches everything

    def ask(self, op: str, *args, **kwargs):
        """The program's answer as plain data and `Remote`s; raises what the program raised."""
        sent = [wire.encode(arg, self.refer) for arg in args]
        named = {name: wire.encode(value, self.refer) for name, value in kwargs.items()}
        self.send({"op": op, "args": sent, "kwargs": named})
        reply = self.receive()
        try:
            for arg, after in zip(args[1:], reply.get("args", ()), strict=False):
                restore(arg, wire.decode(after, self.resolve))
            return wire.decode(reply["value"], self.resolve)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise self.end("its answer is no plain data") from None

    def send(self, message: dict) -> None:
        try:
            self.requests.write(json.dumps(message).encode() + b"\n")
            self.requests.flush()
        except BrokenPipeError:
            raise self.end("it ended") from None

    def receive(self) -> dict:
        """The reply to a request; the test's functions are called meanwhile as asked."""
        while True:
            line = self.replies.readline(MAX_REPLY)
            if not line.endswith(b"\n"):
                raise self.end("its answer is too long" if line else "it ended")
            try:
                reply = json.loads(line)
                if "callback" not in reply:
                    if "raised" in reply:
                        self.error = rebuilt(reply["raised"])
                    else:
                        return reply
            except (ValueError, TypeError, RecursionError):
                raise self.end("its answer makes no sense") from None
            if "raised" in reply:
                raise self.error
            self.send(self.call_back(reply))

    def call_back(self, reply: dict) -> dict:
        try:
            function = self.callbacks[-1 - reply["callback"]]
            args = [wire.decode(arg, self.resolve) for arg in reply["args"]]
            kwargs = {name: wire.decode(v, self.resolve) for name, v in reply["kwargs"].items()}
            return {"value": wire.encode(function(*args, **kwargs), self.refer)}
        except Exception as error:
            return {"raised": f"{type(error).__name__}"}

    def end(self, reason: str) -> ProgramEnded:
        self.ended = reason
        return ProgramEnded(reason)

    def refer(self, value):
        if isinstance(value, Remote):
            return {"ref": object.__getattribute__(value, "_index")}
        if not callable(value):
            raise TypeError(f"{type(value).__name__} cannot be given to the program")
        self.callbacks.append(value)
        return {"ref": -len(self.callbacks)}

    def resolve(self, content):
        if type(content) is not int:
            raise ValueError(content)
        return Remote(self, content) if content >= 0 else self.callbacks[-1 - content]


class Remote:
    """An object that lives with the program: a function, a class, an instance, an iterator.

    Only access is passed on. Comparisons and arithmetic are not, else the program could decide
    them: two remote objects are compared by the program's own `__eq__`, anything else is unequal.
    """

    __slots__ = ("_index", "_link")

    def __init__(self, link: Link, index: int):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_index", index)

    def __call__(self, *args, **kwargs):
        return self._link.ask("call", self, *args, **kwargs)

    def __getattr__(self, name):
        return self._link.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._link.ask("setattr", self, name, value)

    def __getitem__(self, key):
        return self._link.ask("getitem", self, key)

    def __setitem__(self, key, value):
        self._link.ask("setitem", self, key, value)

    def __len__(self):
        return self._link.ask("len", self)

    def __bool__(self):
        return self._link.ask("bool", self)

    def __iter__(self):
        return self._link.ask("iter", self)

    def __next__(self):
        return self._link.ask("next", self)

    def __str__(self):
        return self._link.ask("str", self)

    def __repr__(self):
        return self._link.ask("repr", self)

    def __eq__(self, other):
        return isinstance(other, Remote) and self._link.ask("eq", self, other) is True

    def __hash__(self):
        return self._index


def rebuilt(raised: list) -> Exception:
    """The builtin exception of that name, or of its nearest builtin base."""
    *names, text = raised
    for name in names:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(str(text) if kind is not Exception else f"{names[0]}: {text}")
            except TypeError:  # wants other arguments (UnicodeDecodeError): its base will do
                continue
    return RuntimeError(f"{names[0] if names else ''}: {text}")


def restore(target, value) -> None:
    """What the program did to an argument in place; inner containers keep their identity."""
    if type(target) is not type(value):
        return
    if type(target) in (list, tuple):
        merged = [kept(old, new) for old, new in zip(target, value, strict=False)]
        if type(target) is list:
            target[:] = merged + value[len(merged) :]
    elif isinstance(target, dict):
        merged = {key: kept(target.get(key), new) for key, new in value.items()}
        target.clear()
        target.update(merged)
    elif type(target) is set:
        target.clear()
        target.update(value)
    elif type(target) is bytearray:
        target[:] = value


def kept(old, new):
    """`old` with the content of `new` where it can be changed, else `new`."""
    if type(old) is type(new) and isinstance(old, (list, dict, set, bytearray, tuple)):
        restore(old, new)
        return new if type(old) is tuple and old != new else old
    return new


def run_code(test: dict, link: Link) -> None:
    """Executes a test's code; its assertions are its verdict."""
    space = {"__name__": "test", "__builtins__": builtins}
    for name, module in test["imports"].items():
        found = importlib.import_module(module)
        space[name] = found if name == module else getattr(found, name)
    if test["prompt"]:
        exec(compile(test["prompt"], "prompt", "exec"), space)
    for name in test["remote"]:
        space[name] = link.ask("global", name)
    if test["entry"]:
        space["candidate"] = eval(test["entry"], space)
    exec(compile(test["code"], "test", "exec"), space)
    if test["checks"]:
        space["check"](space["candidate"])
    for name in test["functions"]:
        space[name]()


def run_call(test: dict, link: Link) -> None:
    """Calls one function and compares what it returns."""
    function = link.ask("function", test["function"])
    args = wire.decode(test["args"], wire.refuse)
    kwargs = {name: wire.decode(value, wire.refuse) for name, value in test["kwargs"].items()}
    result = link.ask("call", function, *args, **kwargs)
    if isinstance(result, Remote):  # a generator, a map, a zip
        result = list(result)
    expected = wire.decode(test["expected"], wire.refuse)
    if not equal(result, expected, test["tolerance"]):
        raise AssertionError(f"{shown(result)} where {shown(expected)} is expected")


def equal(found, expected, tolerance: float) -> bool:
    """Equality in which tuples are lists, as in tests that were stored as JSON."""
    if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(
            equal(a, b, tolerance) for a, b in zip(found, expected, strict=True)
        )
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            equal(found[key], expected[key], tolerance) for key in expected
        )
    numbers = all(type(value) in (int, float) for value in (found, expected))
    if tolerance and numbers:
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    both_nan = type(found) is type(expected) is float and found != found and expected != expected
    return both_nan or bool(found == expected)


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def main() -> None:
    folder, events, requests, replies = sys.argv[1:]
    sys.path[len(sys.path) :] = [] if folder == "" else folder.split(os.pathsep)
    report = os.fdopen(int(events), "w")
    link = Link(int(requests), int(replies))
    tests = json.load(sys.stdin)

    def tell(**event) -> None:
        print(json.dumps(event), file=report, flush=True)

    tell(ready=True)
    try:
        link.receive()
    except ProgramEnded as end:
        tell(loaded=False, error=f"program ended: {end}")
        return
    except Exception as error:
        tell(loaded=False, error=described(error))
        return
    tell(loaded=True)
    for index, test in enumerate(tests):
        tell(begin=index)
        error, broken = None, False
        try:
            (run_code if test["kind"] == "code" else run_call)(test, link)
        except BaseException as raised:
            error = described(raised)
            # An import of the test's own that fails is the test's fault.
            broken = isinstance(raised, ImportError) and raised is not link.error
        if link.ended:
            error = f"program ended: {link.ended}"
        tell(end=index, error=error, broken=broken, again=bool(link.ended))
        if link.ended:
            return


def described(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


main()
