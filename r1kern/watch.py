"""A job that cannot go on ends and says why: deadlines of phases, heartbeats between ranks."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from r1kern import nccl

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

EXIT_CODE = 75  # EX_TEMPFAIL: starting again may help

_phases: list[str] = []  # open now, outermost first
_detail = ""  # what the innermost is at


def phase() -> str:
    """What this process is doing, for messages: its open phases and where it stands in them."""
    return " > ".join(_phases or ["other"]) + (f", at {_detail}" if _detail else "")


def at(detail: str) -> None:
    """Name the request or tensor that the present phase is at."""
    global _detail
    _detail = detail


def each(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Passes (name, tensor) pairs on; the last name taken is where the phase is at."""
    for name, value in named:
        at(name)
        yield name, value


@contextmanager
def deadline(name: str, seconds: float):
    """Abort the process, naming phase `name` and this rank, when the block takes over `seconds`.

    A hang inside native code (a collective, the generator) cannot be interrupted from Python, so
    the process prints every thread's stack and exits with status 75; torchrun then ends the other
    ranks and the last checkpoint stands.
    """

    def expire():
        abort(
            f"over the deadline of {seconds:.0f} s; raise run.deadline_s if this phase is only slow"
        )

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    _phases.append(name)
    try:
        yield
    finally:
        timer.cancel()
        _phases.pop()
        at("")


def abort(why: str) -> None:
    """End this process at once, with one line, every thread's stack and exit status 75."""
    rank = os.environ.get("RANK", "0")
    try:
        print(
            f"r1kern: rank {rank} in phase '{phase()}': {why}. Stacks follow.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        faulthandler.dump_traceback_later(10, exit=True)  # the record must not hang in its turn
        if (last := nccl.dump_collectives()) is not None:
            print(f"r1kern: rank {rank}: {last}", file=sys.stderr, flush=True)
    finally:  # whoever read stderr may be gone too
        os._exit(EXIT_CODE)


class Heartbeat:
    """A thread that ends this process when another rank has died or its machine is gone.

    Every rank writes a beat to the store.  Rank 0 reads them all and writes down whose has
    stopped; the others read that, and rank 0's beat.  So the store serves a few requests a second
    and rank, whatever the size of the world.  NCCL notices a lost peer only at its timeout.

    Args:
        store: of the process group; used through a connection of its own.
        patience_s: how long a beat may fail to come; a process that holds Python's lock does not
            beat.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, patience_s: float, period_s: float = 1.0
    ):
        self._store = store.clone()
        self._rank, self._size = rank, size
        self._patience, self._period = patience_s, period_s
        self._left = threading.Event()
        self._seen = {r: ("", time.monotonic()) for r in (range(size) if rank == 0 else [0])}
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave in good order: the others expect no more beats."""
        self._left.set()
        self._thread.join()
        self._store.set(f"beat/{self._rank}", "left")

    def _beat(self, count: int) -> None:
        self._store.set(f"beat/{self._rank}", f"{count} {phase()}")

    def _run(self) -> None:
        count = 0
        while not self._left.wait(self._period):
            count += 1
            # A store on a machine that has gone does not even refuse.
            unanswered = f"the store, or the machine it is on, gave no answer in {self._patience} s"
            timer = threading.Timer(self._patience, abort, [unanswered])
            timer.daemon = True
            timer.start()
            try:
                self._beat(count)
                silent = self._silent() or self._verdict()
                if silent and self._rank == 0:
                    self._store.set("beat/silent", silent)
            except RuntimeError as error:  # what the store's client raises
                silent = f"the store is gone, and the process or machine that held it ({error})"
            timer.cancel()
            if silent:
                abort(silent)

    def _silent(self) -> str:
        """Names the ranks among those watched whose beats have stopped; most often nobody."""
        now, lines = time.monotonic(), []
        beats = self._store.multi_get([f"beat/{r}" for r in self._seen])
        for (rank, (last, since)), beat in zip(list(self._seen.items()), beats, strict=True):
            beat = beat.decode()
            if beat != last:
                self._seen[rank] = (beat, now)
            elif beat != "left" and now - since > self._patience:
                where = beat.partition(" ")[2]
                lines.append(
                    f"rank {rank} has given no sign of life for {now - since:.0f} s, it was in "
                    f"phase '{where}'"
                )
        return "; ".join(lines)

    def _verdict(self) -> str:
        return self._store.get("beat/silent").decode() if self._store.check(["beat/silent"]) else ""
