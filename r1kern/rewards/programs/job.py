"""Runs one program against its tests, in one sandbox or, where functions are called, in two."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import marshal
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from r1kern.errors import UserError
from r1kern.rewards.programs.sandbox import (
    BOX,
    PYTHON,
    PYTHON_FLAGS,
    START_S,
    Limits,
    Sandboxed,
    packages,
    poll,
)
from r1kern.rewards.programs.tests import Stdin

MAX_TIMEOUTS = 2  # tests of one program that may time out; the rest then counts as failed
MAX_RESTARTS = 10  # after tests in which the program ended
CHECKER_MB = 1024
LAST_GASP_S = 0.5
COMPILE_S = 60.0
COMPILER_MB = 2048  # of each of the compiler's processes
EXTRA_OUTPUT = 1 << 20  # bytes of output beyond four times what is expected
_HERE = Path(__file__).parent
_PROGRAM, _CHECKER, _WIRE = ("_code_program", "_code_checker", "_code_wire")
_BROKEN = "broken test: "


class Job:
    """One program and its tests."""

    def __init__(
        self, source: bytes, tests: Sequence, timeout_s: float, limits: Limits, stop: bool
    ):
        self.source, self.tests, self.timeout_s = source, tests, timeout_s
        self.limits, self.stop = limits, stop
        self.errors: dict[int, str | None] = {}  # by index of the test; missing: not run
        self.timeouts = 0

    def record(self, index: int, error: str | None) -> None:
        self.errors[index] = error
        self.timeouts += error == "timeout"

    @property
    def over(self) -> bool:
        """No further test is to be run."""
        return self.timeouts >= MAX_TIMEOUTS or (self.stop and any(self.errors.values()))

    def run_python(self) -> None:
        files = {"program.py": self.source, **_modules(_PROGRAM)}
        stdin = [index for index, test in enumerate(self.tests) if isinstance(test, Stdin)]
        calls = [index for index, test in enumerate(self.tests) if not isinstance(test, Stdin)]
        for index in stdin:
            if not self.over:
                ready_reader, ready = os.pipe()
                command = [*_python(_PROGRAM), "script", self.folders(), str(ready)]
                self.record(index, self.run_stdin(index, command, files, ready_reader, ready))
        restarts = 0
        while calls and not self.over and restarts <= MAX_RESTARTS:
            done = self.run_calls(calls)
            calls, restarts = calls[done:], restarts + 1

    def folders(self) -> str:
        return os.pathsep.join(packages()) if self.limits.site_packages else ""

    def run_cpp(self) -> None:
        for number, test in enumerate(self.tests, 1):
            if not isinstance(test, Stdin):
                raise UserError(f"test {number} is a call: C++ programs take stdin/stdout tests")
        binary, error = compiled(self.source, unsafe_local=self.limits.unsafe_local)
        if error:
            self.record(0, error)
            return
        for index in range(len(self.tests)):
            if not self.over:
                files = {"program": binary}
                self.record(index, self.run_stdin(index, [f"{BOX}/program"], files))

    def run_stdin(self, index, command, files, ready_reader=None, ready=None) -> str | None:
        """Why the program fails a test of standard input, or None.

        Args:
            ready_reader, ready: ends of a pipe, closed here; the program's clock starts when a
                byte comes through (without them, now).
        """
        test = self.tests[index]
        with contextlib.ExitStack() as stack:
            if ready_reader is not None:
                stack.callback(os.close, ready_reader)
            stdin = test.stdin.encode("utf-8", "surrogatepass")
            fds = [] if ready is None else [ready]
            environment = {"PYTHONHASHSEED": "0"}
            try:
                box = Sandboxed(
                    command, files=files, limits=self.limits, stdin=stdin, fds=fds, env=environment
                )
            finally:
                for fd in fds:
                    os.close(fd)
            stack.enter_context(box)
            if ready_reader is not None:
                _await_ready(box, ready_reader)
            if not box.wait(self.timeout_s):
                return "timeout"
            box.kill()
            return _fault(box) or _difference(box.output(_most(test)), test)

    def run_calls(self, indices: list[int]) -> int:
        """Runs tests of functions in order until the program ends; how many are done with."""
        with contextlib.ExitStack() as stack:
            conversation = stack.enter_context(
                _Conversation(self, [self.tests[i] for i in indices])
            )
            error = conversation.load(self.timeout_s)
            if error:
                for index in indices:
                    self.record(index, error)
                return len(indices)
            for done, index in enumerate(indices, 1):
                error, ended = conversation.next_outcome(self.timeout_s)
                if error and error.startswith(_BROKEN):
                    raise UserError(f"test {index + 1} fails by itself ({error[len(_BROKEN) :]})")
                self.record(index, error)
                if ended or self.over:
                    return done
            return len(indices)


class _Conversation:
    """A program and the checker that tests it, each in its sandbox, joined by two pipes."""

    def __init__(self, job: Job, tests: list[dict]):
        self._stack = contextlib.ExitStack()
        self._buffer = b""
        try:
            self._start(job, tests)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> _Conversation:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _start(self, job: Job, tests: list[dict]) -> None:
        with contextlib.ExitStack() as theirs:

            def pipe() -> tuple[int, int]:
                ends = os.pipe()
                for end in ends:
                    theirs.callback(os.close, end)
                return ends

            def keep(end: int) -> int:
                copy = os.dup(end)
                self._stack.callback(os.close, copy)
                return copy

            asked, ask = pipe()
            answer, answered = pipe()
            ready_reader, ready = pipe()
            events, event_writer = pipe()
            self._events, ready_reader = keep(events), keep(ready_reader)
            files = {"program.py": job.source, **_modules(_PROGRAM, _WIRE)}
            fds = (ready, asked, answered)
            argv = [*_python(_PROGRAM), "serve", job.folders(), *map(str, fds)]
            self._program = self._stack.enter_context(
                Sandboxed(
                    argv, files=files, limits=job.limits, fds=fds, env={"PYTHONHASHSEED": "0"}
                )
            )
            fds = (event_writer, ask, answer)
            argv = [*_python(_CHECKER), job.folders(), *map(str, fds)]
            checker_limits = Limits(
                CHECKER_MB,
                job.limits.cpu_s + START_S,
                unsafe_local=job.limits.unsafe_local,
                site_packages=job.limits.site_packages,
            )
            self._checker = self._stack.enter_context(
                Sandboxed(
                    argv,
                    files=_modules(_CHECKER, _WIRE),
                    limits=checker_limits,
                    stdin=json.dumps(tests).encode(),
                    fds=fds,
                )
            )
        _await_ready(self._program, ready_reader)
        try:
            event = self._event(START_S)
        except TimeoutError:
            event = None
        if event != {"ready": True}:
            raise _not_started(self._checker)

    def load(self, seconds: float) -> str | None:
        """Why the program cannot be loaded, or None."""
        try:
            event = self._event(seconds)
        except TimeoutError:
            return "timeout"
        if event is None:
            return self._end_of_checker()
        return None if event["loaded"] else self._explained(event["error"])

    def next_outcome(self, seconds: float) -> tuple[str | None, bool]:
        """Why the next test failed, or None; and whether the conversation is over."""
        try:
            begin = self._event(seconds)
            end = begin and self._event(seconds)
        except TimeoutError:
            return "timeout", True
        if end is None:
            return self._end_of_checker(), True
        if end["broken"]:
            return _BROKEN + end["error"], True
        return end["error"] and self._explained(end["error"]), end["again"]

    def _explained(self, error: str) -> str:
        if error.startswith("program ended"):
            self._program.wait(LAST_GASP_S)  # for its own exit code
            self._program.kill()
            return _fault(self._program) or error
        if error.startswith("MemoryError"):
            return "memory"
        if error.startswith(("SyntaxError", "IndentationError", "TabError")):
            return f"syntax error: {error.partition(': ')[2]}"
        kind, _, text = error.partition(": ")
        return f"wrong answer: {text or kind}" if kind == "AssertionError" else f"failed: {error}"

    def _end_of_checker(self) -> str:
        """The checker does not end by itself: a test used up its memory or exited."""
        self._checker.kill()
        return f"the test ended with exit code {self._checker.exit_code()}"

    def _event(self, seconds: float) -> dict | None:
        """The checker's next message, None at its end. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not poll([self._events], deadline - time.monotonic()):
                raise TimeoutError
            chunk = os.read(self._events, 65536)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def _python(script: str) -> list[str]:
    return [PYTHON, *PYTHON_FLAGS, f"{BOX}/{script}.pyc"]


def _modules(*names: str) -> dict[str, bytes]:
    return {f"{name}.pyc": _bytecode(name) for name in names}


@functools.cache
def _bytecode(name: str) -> bytes:
    """A compiled module, as the interpreter reads it from a file: each start would compile it."""
    code = compile((_HERE / f"{name}.py").read_text(), name, "exec")
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _await_ready(box: Sandboxed, reader: int) -> None:
    """Waits until the interpreter is about to read the program."""
    if not poll([reader], START_S) or not os.read(reader, 1):
        raise _not_started(box)


def _not_started(box: Sandboxed) -> UserError:
    box.kill()
    code = box.exit_code()
    reason = box.errors().strip()[-300:] or f"exit code {code}, no start within {START_S:.0f} s"
    return UserError(f"Python does not start in the sandbox ({reason}): raise sandbox.memory_mb?")


def _fault(box: Sandboxed) -> str | None:
    """How a program that has ended failed, by its exit code and standard error."""
    code = box.exit_code()
    if code == 0:
        return None
    errors = box.errors()
    last = errors.strip().rpartition("\n")[2][:200]
    if "MemoryError" in last or "bad_alloc" in errors:
        return "memory"
    if "SyntaxError" in last or "IndentationError" in last or "TabError" in last:
        return f"syntax error: {last.partition(': ')[2]}"
    return f"exit code {code}: {last}" if last else f"exit code {code}"


def _most(test: Stdin) -> int:
    return 4 * len(test.expected) + EXTRA_OUTPUT


def _difference(output: bytes | None, test: Stdin) -> str | None:
    """Why an output is wrong: its words line by line, blank lines at either end left out."""
    if output is None:
        return f"wrong answer: over {_most(test)} bytes of output"
    found = [line.split() for line in output.decode(errors="replace").strip().split("\n")]
    expected = [line.split() for line in test.expected.strip().split("\n")]
    if len(found) == len(expected) and all(
        len(a) == len(b) and all(_same(x, y, test.tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(found, expected, strict=True)
    ):
        return None
    for number, (a, b) in enumerate(zip(found, expected, strict=False), 1):
        if a != b:
            shown, wanted = " ".join(a)[:60], " ".join(b)[:60]
            return f"wrong answer: line {number}: {shown!r} where {wanted!r} is expected"
    return f"wrong answer: {len(found)} lines where {len(expected)} are expected"


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


def _same(found: str, expected: str, tolerance: float) -> bool:
    if found == expected:
        return True
    if not tolerance or max(len(found), len(expected)) > 400:
        return False
    if not (_NUMBER.fullmatch(found) and _NUMBER.fullmatch(expected)):
        return False
    return math.isclose(float(found), float(expected), rel_tol=tolerance, abs_tol=tolerance)


def compiled(source: bytes, *, unsafe_local: bool = False) -> tuple[bytes, str | None]:
    """A C++ program's binary, or why it does not compile.

    Raises:
        UserError: there is no g++.
    """
    script = (
        "command -v g++ >/dev/null || exit 99; cd ${TMPDIR:-/tmp} && "
        f"g++ -std=c++17 -O2 -o out {BOX}/a.cpp && cat out"
    )
    limits = Limits(COMPILER_MB, COMPILE_S, may_fork=True, unsafe_local=unsafe_local)
    argv = ["/bin/sh", f"{BOX}/compile.sh"]
    files = {"a.cpp": source, "compile.sh": script.encode()}
    with Sandboxed(argv, files=files, limits=limits) as box:
        if not box.wait(COMPILE_S):
            return b"", f"compile error: no end within {COMPILE_S:.0f} s"
        box.kill()
        code = box.exit_code()
        if code == 99:
            raise UserError("no C++ compiler to test C++ programs with: `apt install g++`")
        if code == 0:
            return box.output(), None
        errors = [line for line in box.errors().splitlines() if "error" in line]
        return b"", f"compile error: {(errors or ['exit code ' + str(code)])[0][:200]}"
