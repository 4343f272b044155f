"""`pipeline.json`: the stages of a pipeline and who feeds whom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from r1kern.report.page.records import items, mapping, number, numbers, read_json, string

PIPELINE = "pipeline.json"
STATES = ("done", "running", "failed", "pending")


@dataclass(frozen=True)
class Stage:
    """One stage as the file has it; missing keys are empty.

    Attributes:
        accuracy: label -> ("pass@1", half of its interval or None, "308 problems x 8 samples").
        run: folder of its run, None where it has none.
    """

    name: str
    kind: str
    state: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    counts: dict[str, float]
    dropped: dict[str, float]
    accuracy: dict[str, tuple[float, float | None, str]]
    seconds: float | None
    run: Path | None
    notes: list[str]


def read_stages(folder: Path) -> tuple[dict, list[Stage]]:
    """The file's own keys and its stages; ({}, []) where it is not JSON."""
    found = read_json(folder / PIPELINE) or {}
    return found, [_stage(s, i, folder) for i, s in enumerate(items(found.get("stages")), start=1)]


def _stage(value: object, place: int, folder: Path) -> Stage:
    entry = mapping(value)
    run = string(entry.get("run"))
    return Stage(
        name=string(entry.get("name")) or f"stage {place}",
        kind=string(entry.get("kind")),
        state=string(entry.get("state")),
        inputs=_texts(entry.get("inputs")),
        outputs=_texts(entry.get("outputs")),
        counts=numbers(entry.get("counts")),
        dropped=numbers(entry.get("dropped")),
        accuracy=_accuracy(entry.get("accuracy")),
        seconds=number(entry.get("seconds")),
        run=folder / run if run and "\0" not in run and len(run) < 1000 else None,
        notes=[string(note) for note in items(entry.get("notes"))],
    )


def _texts(value: object) -> dict[str, str]:
    return {str(k): string(v) for k, v in mapping(value).items() if string(v)}


def _accuracy(value: object) -> dict[str, tuple[float, float | None, str]]:
    found = {}
    for label, entry in mapping(value).items():
        measured = numbers(entry)
        if "pass@1" in measured:
            counts = [f"{measured[k]:.0f} {k}" for k in ("problems", "samples") if k in measured]
            half = measured.get("half_interval")
            found[str(label)] = (measured["pass@1"], half, " x ".join(counts))
    return found


def feeds(stages: list[Stage]) -> list[list[tuple[int, str]]]:
    """Of each stage the earlier ones (by index) whose output it takes, with the input's label.

    An input names a stage or its output as "stage.output", or a path that is an output of one or
    lies within it; of several the latest earlier one is meant.
    """
    found = []
    for i, stage in enumerate(stages):
        edges: dict[int, str] = {}
        for label, value in stage.inputs.items():
            source = _source(value, stages[:i])
            if source is not None:
                edges[source] = f"{edges[source]}, {label}" if source in edges else label
        found.append(sorted(edges.items()))
    return found


def _source(value: str, earlier: list[Stage]) -> int | None:
    for i in reversed(range(len(earlier))):
        if earlier[i].name in (value, value.partition(".")[0]):
            return i
    path = PurePosixPath(value)
    for i in reversed(range(len(earlier))):
        outputs = [PurePosixPath(output) for output in earlier[i].outputs.values()]
        if any(path == output or output in path.parents for output in outputs):
            return i
    return None
