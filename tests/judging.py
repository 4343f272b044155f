"""The faulty judge server of `workers/judge_server.py`, as several test files start it."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator

from launch import TESTS

from r1kern.config import Judge

_numbers = itertools.count()


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a server that lives as long as the context."""
    script = str(TESTS / "workers" / "judge_server.py")
    server = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.communicate()


def options(server: str, plan: str = "ok", **more) -> Judge:
    """Options for a model of its own that answers by `plan`."""
    fields = {"timeout_s": 5.0, "deadline_s": 20.0, "retries": 2, **more}
    judge = Judge(url=f"{server}/v1", model=f"{plan}#{next(_numbers)}", **fields)
    _ask(judge, "serve")
    return judge


def log(judge: Judge) -> dict:
    """What reached the server for this model: "requests", and "most" at a time."""
    return _ask(judge, "log")


def _ask(judge: Judge, what: str) -> dict:
    address = f"{judge.url.removesuffix('/v1')}/{what}?{urllib.parse.quote(judge.model)}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)
