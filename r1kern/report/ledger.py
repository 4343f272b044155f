"""Time by phase: a step's seconds sum to its wall clock."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

from r1kern import watch


class Ledger:
    """Splits a step's wall clock into named phases; what no phase claims is "other".

    Args:
        deadline_s: a phase that takes longer aborts the process (see `watch.deadline`).
    """

    def __init__(self, deadline_s: float):
        self._deadline_s = deadline_s
        self._phases: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        """Count the block as `phase`; an error within it is told which phase it was."""
        start = time.perf_counter()
        try:
            with watch.deadline(phase, self._deadline_s):
                try:
                    yield
                except Exception as error:
                    rank = os.environ.get("RANK", "0")
                    error.add_note(f"r1kern: rank {rank} in phase '{watch.phase()}'")
                    raise
        finally:
            spent = time.perf_counter() - start
            self._phases[phase] = self._phases.get(phase, 0.0) + spent

    def close_step(self) -> dict[str, float]:
        """Seconds by phase since the last call, "other" and their sum "step" included."""
        now = time.perf_counter()
        total = now - self._started
        seconds = dict(self._phases)
        seconds["other"] = total - sum(seconds.values())
        seconds["step"] = total
        self._phases, self._started = {}, now
        return seconds
