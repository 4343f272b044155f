"""An evaluation's page: every benchmark's metrics in a table, pass@1 with its interval."""

from __future__ import annotations

from pathlib import Path

from r1kern.report.page.bars import Measured, points, rows
from r1kern.report.page.records import items, mapping, number, numbers, read_json, string
from r1kern.report.page.run import facts
from r1kern.report.page.text import NONE, brief, safe, short

RESULTS = "results.json"
SHARES = ("pass@", "cons@", "accuracy", "truncated", "half_interval", "acc", "exact_match")


def evaluation_section(folder: Path) -> str:
    """Of `{"benchmarks": {name: {"metrics": {metric: value}, "left_out": {reason: count}}}}`.

    A benchmark's metrics may also stand beside its name; `interval` is [low, high] of pass@1.
    """
    found = read_json(folder / RESULTS) or {}
    benchmarks = {str(k): mapping(v) for k, v in mapping(found.get("benchmarks")).items()}
    if not benchmarks:
        return f'<p class="bad">{RESULTS} holds no benchmarks: cut short, or none is done.</p>'
    known = [(str(k), brief(_told(v), 300)) for k, v in found.items() if k != "benchmarks"]
    metrics = {name: mapping(b.get("metrics")) or b for name, b in benchmarks.items()}
    measured = [m for name, row in metrics.items() if (m := _measured(name, row)) is not None]
    note = "Bar: 95 % interval over problems." if any(i for *_, i in measured) else ""
    return "".join(
        [
            facts(known),
            points("pass@1", measured, note),
            _table({name: _flat(row) for name, row in metrics.items()}),
            *(_left_out(name, b) for name, b in benchmarks.items()),
        ]
    )


def _told(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {string(v)}" for k, v in value.items() if string(v))
    return string(value)


def _measured(name: str, row: dict) -> Measured | None:
    value = number(row.get("pass@1"))
    if value is None:
        return None
    ends = [number(end) for end in items(row.get("interval"))]
    half = number(row.get("half_interval"))
    if len(ends) == 2 and None not in ends and ends[0] <= ends[1]:
        return name, value, (ends[0], ends[1])
    return name, value, None if half is None else (value - half, value + half)


def _flat(row: dict) -> dict[str, float]:
    """Numbers of a benchmark, those of a mapping within as "outer/inner"."""
    inner = {
        f"{outer}/{name}": value
        for outer, within in row.items()
        for name, value in numbers(within).items()
    }
    return numbers(row) | inner


def _table(benchmarks: dict[str, dict[str, float]]) -> str:
    metrics = list(dict.fromkeys(metric for row in benchmarks.values() for metric in row))
    head = "".join(f'<th class="n">{safe(brief(metric, 60))}</th>' for metric in metrics)
    body = "".join(
        f"<tr><td>{safe(brief(name, 80))}</td>"
        + "".join(f'<td class="n">{_cell(metric, row.get(metric))}</td>' for metric in metrics)
        + "</tr>"
        for name, row in benchmarks.items()
    )
    return f'<div class="table"><table><tr><th>benchmark</th>{head}</tr>{body}</table></div>'


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return NONE
    return short(value, percent=metric.startswith(SHARES) and abs(value) <= 1)


def _left_out(name: str, benchmark: dict) -> str:
    counts = sorted(numbers(benchmark.get("left_out")).items(), key=lambda pair: -pair[1])
    whole = sum(count for _, count in counts)
    return rows(f"{name}: {short(whole)} problems left out", counts, unit="", whole=whole)
