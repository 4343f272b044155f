"""A run's folder as columns over its training steps."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from r1kern.report.machine import MACHINE
from r1kern.report.metrics import METRICS
from r1kern.report.page.records import Broken, number, read_config, read_json, read_lines
from r1kern.report.page.series import Series

EVAL = "eval/"


@dataclass(frozen=True)
class RunData:
    """What a run has written.

    Attributes:
        steps: of training that there are records of, counted from 1.
        columns: metric -> value at each of `steps`, None where it is missing.
        done: training steps before each evaluation.
        evaluations: metric (without "eval/"; seconds by phase too) -> value at each of `done`.
        config, config_text: `config.yaml`, parsed and as it stands.
        model: the trained model's `config.json`, else the starting model's, else empty.
        machine: `machine.json`, else empty.
        ended: when metrics were last written.
    """

    folder: Path
    steps: tuple[int, ...]
    columns: dict[str, tuple[float | None, ...]]
    done: tuple[int, ...]
    evaluations: dict[str, tuple[float | None, ...]]
    config: dict
    config_text: str
    model: dict
    machine: dict
    ended: datetime | None

    def series(self, metric: str, name: str = "") -> Series:
        return Series(name or metric, self.steps, self.columns[metric])

    def evaluated(self, metric: str, name: str = "", half: str = "") -> Series:
        """Of the evaluations; `half` names the metric of half its interval."""
        spread = self.evaluations.get(half, (None,) * len(self.done))
        return Series(name or metric, self.done, self.evaluations[metric], half=spread)

    def option(self, *path: str) -> object:
        """A configuration value, None where there is none."""
        value: object = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / "config.yaml").is_file()


def read_run(folder: Path, broken: Broken) -> RunData:
    """Everything but the completions."""
    trained: dict[int, dict] = {}
    evaluated: dict[int, dict] = {}
    for record in read_lines(folder / METRICS, broken):
        step = number(record.get("step"))
        if step is None or not 0 <= step < 2**53:
            continue
        if any(key.startswith(EVAL) for key in record):
            evaluated[int(step)] = record
        else:
            trained[int(step) + 1] = record  # the log counts from 0
    steps, done = _grid(sorted(trained)), tuple(sorted(evaluated))
    config, text = read_config(folder / "config.yaml")
    path = folder / METRICS
    return RunData(
        folder=folder,
        steps=steps,
        columns=_columns(trained, steps),
        done=done,
        evaluations={k.removeprefix(EVAL): v for k, v in _columns(evaluated, done).items()},
        config=config,
        config_text=text,
        model=_model(folder, config),
        machine=read_json(folder / MACHINE) or {},
        ended=datetime.fromtimestamp(path.stat().st_mtime).astimezone() if path.is_file() else None,
    )


def _grid(steps: list[int]) -> tuple[int, ...]:
    """Every step from the first to the last, so that lost ones are gaps; not across a chasm."""
    if not steps or steps[-1] - steps[0] > 2 * len(steps) + 1000:
        return tuple(steps)
    return tuple(range(steps[0], steps[-1] + 1))


def _columns(records: dict[int, dict], steps: tuple[int, ...]) -> dict[str, tuple]:
    names = dict.fromkeys(k for record in records.values() for k in record if k != "step")
    columns = {
        name: tuple(number(records.get(step, {}).get(name)) for step in steps) for name in names
    }
    return {k: v for k, v in columns.items() if any(value is not None for value in v)}


def _model(folder: Path, config: dict) -> dict:
    found = read_json(folder / "model" / "config.json")
    model = config.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    if found is None and isinstance(path, str):
        try:
            found = read_json(Path(path) / "config.json")
        except (OSError, ValueError):  # a path that is none: too long, a NUL in it
            found = None
    return found or {}
