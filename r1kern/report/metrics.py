"""Metrics of a run: one dictionary a step, written once to every sink."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

METRICS = "metrics.jsonl"

# (metric, short name, format) of the line printed for a step; absent metrics are left out.
LINE = (
    ("loss", "loss", "{:.4f}"),
    ("reward", "reward", "{:.3f}"),
    ("pass_rate", "pass", "{:.3f}"),
    ("response_length", "len", "{:.1f}"),
    ("kl", "kl", "{:.1e}"),
    ("entropy", "ent", "{:.3f}"),
    ("clip_fraction", "clip", "{:.3f}"),
    ("max_mismatch", "mismatch", "{:.1e}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("tokens_per_s", "tok/s", "{:.0f}"),
)


class MetricsLog:
    """JSONL and TensorBoard files, a line on the terminal and a bar with the time left.

    Args:
        folder: of the run.
        total_steps: steps of the whole run.
        first_step: where this process begins; lines of later steps that an interrupted process
            left in the JSONL file are removed.
        active: the other ranks write nothing.
    """

    def __init__(self, folder: Path, *, total_steps: int, first_step: int, active: bool):
        self._active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS
        _truncate(self._path, first_step)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._total, self._first = total_steps, first_step
        self._began = time.perf_counter()
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task(
            folder.name, total=total_steps, completed=first_step, eta=""
        )
        self._progress.start()

    def step(self, step: int, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        """Write the metrics of `step` (counted from 0) and its seconds by phase."""
        if not self._active:
            return
        self._write(step, {**metrics, **{f"seconds/{k}": v for k, v in seconds.items()}})
        eta = self._eta(step + 1)
        self._progress.update(self._bar, completed=step + 1, eta=eta)
        terms = [f" {k[7:]} {v:.2f}" for k, v in metrics.items() if k.startswith("reward/")]
        shown = [
            f"{short} {form.format(metrics[k])}" + ("".join(terms) if k == "reward" else "")
            for k, short, form in LINE
            if k in metrics
        ]
        shares = {k: v for k, v in seconds.items() if k != "step" and v >= 0.005}
        times = " + ".join(f"{k} {v:.2f}" for k, v in shares.items())
        self._console.print(
            f"step {step + 1:>{len(str(self._total))}}/{self._total} | {' | '.join(shown)} | "
            f"{seconds['step']:.2f} s = {times} | {eta}"
        )

    def note(self, step: int, metrics: dict[str, float], text: str) -> None:
        """Write metrics that belong between steps (an evaluation) and print `text`."""
        if self._active:
            self._write(step, metrics)
            self._console.print(text)

    def close(self) -> None:
        if self._active:
            self._progress.stop()
            self._board.close()
            self._file.close()

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def _eta(self, done: int) -> str:
        spent = time.perf_counter() - self._began
        left = spent / (done - self._first) * (self._total - done)
        return f"{int(left // 60)}:{int(left % 60):02d} left"


def read_metrics(folder: str | Path) -> list[dict]:
    """The records of a run's `metrics.jsonl`, one dictionary per line."""
    lines = (Path(folder) / METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def _truncate(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line)
        except json.JSONDecodeError:  # the line that the interruption cut short
            continue
    path.write_text("".join(line + "\n" for line in kept))
