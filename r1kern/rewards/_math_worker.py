"""The process that judges answers for `r1kern.rewards.math`; started by path, never imported.

It imports the grammar and math-verify once and forks a judge. Requests and replies are JSON lines
on stdin and stdout. A judge that takes too long is ended by its own timers, inside a long C call
too and also when the parent is gone; its death is the reply, and a new one is forked at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import mmap
import os
import resource
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
# What builds the tables of the parsers and has sympy import what it imports when first used.
WARM_UP = (
    r"\int_0^1 2x\,dx",
    r"\sum_{n=1}^{\infty} \frac{1}{2^n}",
    r"\lim_{x\to 0} \frac{\sin x}{x}",
    r"\sum_{n=1}^{\infty} \frac{1}{n^2}",
)
MAX_FRAMES = 8_000  # the grammar bounds its depth; sympy's trees of a long sum are deeper


def main() -> None:
    memory_bytes = int(sys.argv[1]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(MAX_FRAMES)
    sys.path.append(str(Path(__file__).parents[2]))
    try:
        judge = make_judge()
    except ImportError as error:
        reply({"missing": str(error)})
        return
    for text in WARM_UP:
        judge(text, "1")
    gc.freeze()
    reply({"ready": True})
    asked = mmap.mmap(-1, 8)  # the number of the request at work, shared with the judge
    while True:
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            serve(judge, asked)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        reply({"id": int.from_bytes(asked[:], "little"), "died": code})


def make_judge():
    """The function (prediction, gold) -> whether they are equivalent."""
    from math_verify import parse, verify

    from r1kern.rewards.equivalence.equal import equivalent

    def judge(prediction: str, gold: str) -> bool:
        verdict = equivalent(prediction, gold)
        if verdict is None:  # sums, integrals, limits, ...
            # math-verify's own time limits are off: they cannot interrupt a long C call.
            golds, found = (
                parse(
                    f"${text.replace('$', '')}$", parsing_timeout=None, fallback_mode="no_fallback"
                )
                for text in (gold, prediction)
            )
            verdict = bool(golds and found and verify(golds, found, timeout_seconds=None))
        return verdict

    return judge


def serve(judge, asked: mmap.mmap) -> None:
    """Answers requests until stdin ends."""
    for line in lines():
        request = json.loads(line)
        asked[:] = request["id"].to_bytes(8, "little")
        # The default action of SIGPROF and of SIGALRM ends the process.
        signal.setitimer(signal.ITIMER_REAL, request["wall_s"])
        signal.setitimer(signal.ITIMER_PROF, request["processor_s"])
        correct = judge(request["prediction"], request["gold"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({"id": request["id"], "correct": correct})


def lines():
    """The newest line of stdin; nothing is read ahead that a successor would miss.

    One request is asked at a time, so that what lies before another is overdue: nobody waits for
    its reply.
    """
    pending = b""
    while chunk := os.read(0, 65536):
        pending += chunk
        if pending.endswith(b"\n"):
            yield pending.splitlines()[-1]
            pending = b""


def reply(message: dict) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
