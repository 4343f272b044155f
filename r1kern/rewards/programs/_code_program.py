"""Runs a program under test inside its sandbox; started by path, never imported.

`script`: the program is `__main__` and reads standard input. `serve`: the program is loaded, then
asked over two pipes for what its functions return. Nothing here knows an expected output, so the
program may do with this process what it likes.
"""

from __future__ import annotations

import os
import sys
import types


def main() -> None:
    mode, folder, ready, *fds = sys.argv[1:]
    sys.path[:0] = [] if folder == "" else folder.split(os.pathsep)
    sys.setrecursionlimit(sys.getrecursionlimit() + 20)  # our own frames
    install_quitters()
    with open(os.path.join(os.path.dirname(__file__), "program.py"), "rb") as file:
        source = file.read()
    if mode == "script":
        announce(int(ready))
        script(source)
    else:
        sys.path.insert(0, os.path.dirname(__file__))
        import _code_wire

        del sys.path[0]
        serve = Server(_code_wire, *map(int, fds))
        announce(int(ready))
        serve.load(source)
        serve.forever()


def announce(fd: int) -> None:
    """The deadline counts from here: no line of the program has been read."""
    os.write(fd, b"\n")
    os.close(fd)


def install_quitters() -> None:
    """`exit` and `quit`, which the site module would define."""
    import builtins
    from _sitebuiltins import Quitter

    builtins.exit = Quitter("exit", "Ctrl-D")
    builtins.quit = Quitter("quit", "Ctrl-D")


def script(source: bytes) -> None:
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=__builtins__, __file__="program.py")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), module.__dict__)


class Server:
    """Answers requests: one JSON line in, one out."""

    def __init__(self, wire, requests: int, replies: int):
        import json

        self.json, self.wire = json, wire
        self.requests = os.fdopen(requests, "rb")
        self.replies = os.fdopen(replies, "wb")
        self.objects = []  # what the other side holds a reference to
        self.known = {}  # id of each -> its index
        self.module = types.ModuleType("program")

    def load(self, source: bytes) -> None:
        sys.modules["program"] = self.module
        self.module.__dict__.update(__builtins__=__builtins__, __file__="program.py")
        sys.argv = ["program.py"]
        try:
            exec(compile(source, "program.py", "exec"), self.module.__dict__)
        except BaseException as error:
            self.send({"raised": raised(error)})
        else:
            self.send({"value": None})

    def forever(self) -> None:
        for line in self.requests:
            try:
                reply = self.answer(line)
                text = self.json.dumps(reply)
            except BaseException as error:
                text = self.json.dumps({"raised": raised(error)})
            self.replies.write(text.encode() + b"\n")
            self.replies.flush()

    def answer(self, line: bytes) -> dict:
        request = self.json.loads(line)
        args = self.decode(request["args"])
        kwargs = {name: self.decode(value) for name, value in request["kwargs"].items()}
        reply = {"value": self.encode(getattr(self, "do_" + request["op"])(*args, **kwargs))}
        if request["op"] == "call":
            after = [self.encode(arg) for arg in args[1:]]
            if after != request["args"][1:]:
                reply["args"] = after
        return reply

    def encode(self, value):
        return self.wire.encode(value, self.refer)

    def decode(self, data):
        return self.wire.decode(data, self.resolve)

    def refer(self, value):
        if isinstance(value, Callback):
            return {"ref": value.index}
        if id(value) not in self.known:
            self.known[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"ref": self.known[id(value)]}

    def resolve(self, content):
        return self.objects[content] if content >= 0 else Callback(self, content)

    def send(self, message: dict) -> None:
        self.replies.write(self.json.dumps(message).encode() + b"\n")
        self.replies.flush()

    def call_back(self, index: int, args, kwargs):
        """A function of the test, called by the program."""
        args = [self.encode(arg) for arg in args]
        kwargs = {name: self.encode(value) for name, value in kwargs.items()}
        self.send({"callback": index, "args": args, "kwargs": kwargs})
        reply = self.json.loads(self.requests.readline())
        if "raised" in reply:
            raise RuntimeError(f"the test's function raised {reply['raised']}")
        return self.decode(reply["value"])

    def do_global(self, name):
        if name not in self.module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return self.module.__dict__[name]

    def do_function(self, name):
        """A function, or the method of a class named Solution; None: the one there is."""
        names, solution = self.module.__dict__, self.module.__dict__.get("Solution")
        if name in names:
            return names[name]
        if isinstance(solution, type):
            public = [key for key in vars(solution) if not key.startswith("_")]
            return getattr(solution(), name or public[-1])
        if name is not None:
            raise NameError(f"name {name!r} is not defined")
        functions = [f for f in names.values() if isinstance(f, types.FunctionType)]
        own = [f for f in functions if f.__module__ == "program"]
        if not own:
            raise NameError("the program defines no function")
        return own[-1]

    def do_call(self, function, *args, **kwargs):
        return function(*args, **kwargs)

    def do_getattr(self, value, name):
        return getattr(value, name)

    def do_setattr(self, value, name, to):
        setattr(value, name, to)

    def do_getitem(self, value, key):
        return value[key]

    def do_setitem(self, value, key, to):
        value[key] = to

    def do_len(self, value):
        return len(value)

    def do_bool(self, value):
        return bool(value)

    def do_iter(self, value):
        return iter(value)

    def do_next(self, value):
        return next(value)

    def do_str(self, value):
        return str(value)

    def do_repr(self, value):
        return repr(value)

    def do_eq(self, value, other):
        return value == other


class Callback:
    """A function of the test as the program sees it."""

    def __init__(self, server: Server, index: int):
        self.server, self.index = server, index

    def __call__(self, *args, **kwargs):
        return self.server.call_back(self.index, args, kwargs)


def raised(error: BaseException) -> list:
    """An exception as the names of its classes, the builtin ones found there, and its text."""
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    names = [kind.__name__ for kind in type(error).__mro__]
    return [*names, text]


main()
