"""Python processes that need not import what `preload.py` has: real ones, but for their start.

They share that process's hash seed, the environment that libraries read while they were imported,
and the order of these imports: where one of them matters, a test starts a fresh interpreter.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy
import torch

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["preload"])


def ensure_running(environment: Mapping[str, str]) -> None:
    """Of the process that multiprocessing's start method "forkserver" forks."""
    with patch.dict(os.environ, environment, clear=True):
        multiprocessing.forkserver.ensure_running()


class Forked:
    """`python ARGUMENTS`, of which the first is `-m`, `-c` or a script, in a session of its own."""

    def __init__(
        self,
        arguments: list[str],
        environment: Mapping[str, str],
        cwd: Path | None = None,
    ):
        ensure_running(environment)
        self._output = tempfile.TemporaryDirectory()
        started = (arguments, dict(environment), str(cwd or Path.cwd()), self._output.name)
        self._process = _server.Process(target=_begin, args=started)
        self._process.start()
        self.pid, self.sentinel = self._process.pid, self._process.sentinel

    def poll(self) -> int | None:
        """The exit code, if it has ended: negative after a signal."""
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int | None:
        self._process.join(timeout_s)
        return self.poll()

    def kill(self) -> None:
        """With all that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def output(self) -> tuple[str, str]:
        """What it has printed so far, to stdout and to stderr."""
        files = (Path(self._output.name, name) for name in STREAMS)
        return tuple(file.read_text() if file.exists() else "" for file in files)


STREAMS = ("stdout", "stderr")


def _begin(arguments: list[str], environment: dict[str, str], cwd: str, output: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for number, name in enumerate(STREAMS, 1):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # As in every fresh process, of its own: what is not seeded must not agree by chance.
    torch.seed()
    numpy.random.seed()
    code = _main(arguments)
    atexit._run_exitfuncs()
    sys.exit(code)


def _main(arguments: list[str]) -> int | str | None:
    """Runs the main module as the interpreter does, to the exit code."""
    kind, *rest = arguments
    sys.argv = rest if kind == "-m" else arguments
    sys.path.insert(0, str(Path(kind).parent) if kind[0] != "-" else os.getcwd())
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        else:
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return None
