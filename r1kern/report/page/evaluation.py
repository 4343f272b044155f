"""An evaluation's page: every benchmark's metrics in a table."""

from __future__ import annotations

from pathlib import Path

from r1kern.report.page.bars import points
from r1kern.report.page.records import mapping, numbers, read_json, string
from r1kern.report.page.run import facts
from r1kern.report.page.text import NONE, brief, safe, short

RESULTS = "results.json"
HALVES = ("half_interval", "pass@1_half_interval")
SHARES = ("pass@", "cons@", "accuracy", "greedy")


def evaluation_tabs(folder: Path) -> list[tuple[str, str]]:
    """The one tab of `{"benchmarks": {name: {metric: value}}}`."""
    found = read_json(folder / RESULTS) or {}
    benchmarks = {str(k): numbers(v) for k, v in mapping(found.get("benchmarks")).items()}
    if not benchmarks:
        empty = f'<p class="bad">{RESULTS} holds no benchmarks: cut short, or none is done.</p>'
        return [("Evaluation", empty)]
    known = [(str(k), brief(string(v), 200)) for k, v in found.items() if k != "benchmarks"]
    measured = [
        (name, m["pass@1"], next((m[h] for h in HALVES if h in m), None))
        for name, m in benchmarks.items()
        if "pass@1" in m
    ]
    note = "Bar: 95 % interval." if any(half is not None for *_, half in measured) else ""
    return [("Evaluation", facts(known) + points("pass@1", measured, note) + _table(benchmarks))]


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
    share = metric in HALVES or metric.startswith(SHARES)
    return short(value, percent=share and abs(value) <= 1)
