"""Results of an evaluation: a JSON file, a Markdown table, and the table on the screen."""

from __future__ import annotations

import json
from pathlib import Path

COLUMNS = (
    "benchmark",
    "problems x k",
    "pass@1 %",
    "95 % interval",
    "pass@k %",
    "cons@k %",
    "cut %",
    "tokens",
    "unjudged",
)


def write_results(folder: Path, results: dict) -> None:
    """`results.json` and `results.md` in `folder`, each whole or as before."""
    for name, text in (
        ("results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
        ("results.md", markdown(results)),
    ):
        scratch = folder / f"{name}.tmp"
        scratch.write_text(text, encoding="utf-8")
        scratch.rename(folder / name)


def markdown(results: dict) -> str:
    """The results as a Markdown document."""
    protocol = results["protocol"]
    lines = [
        f"# Evaluation of {results['model']}",
        "",
        f"Temperature {protocol['temperature']}, top-p {protocol['top_p']}, at most "
        f"{protocol['max_tokens']} tokens unless the table's JSON says otherwise; zero-shot; seed "
        f"{results['seed']}. pass@1 is the mean over k samples (arXiv 2501.12948, section 3); the "
        "interval is over problems; what no grader could judge is counted apart.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(results)),
    ]
    for name, result in results["benchmarks"].items():
        if (rated := result["metrics"].get("codeforces")) is not None:
            share = f", percentile {rated['percentile']:.1f}" if "percentile" in rated else ""
            contests = f"over {len(rated['contests'])} contests"
            lines += ["", f"{name}: expected rating {rated['rating']} {contests}{share}."]
        for reason, count in result["left_out"].items():
            lines += ["", f"{name}: {count} problems left out: {reason}."]
    return "\n".join(lines) + "\n"


def table(results: dict) -> str:
    """The results as lines of aligned columns."""
    cells = [COLUMNS, *rows(results)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [zip(row, widths, strict=True) for row in cells]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in line) for line in lines)


def rows(results: dict) -> list[tuple[str, ...]]:
    """One row a benchmark, a text a column of `COLUMNS`."""
    return [_row(name, result["metrics"]) for name, result in results["benchmarks"].items()]


def _row(name: str, m: dict) -> tuple[str, ...]:
    interval = m["interval"]
    best = max((k for k in m if k.startswith("pass@")), key=lambda k: int(k[5:]))
    cons = next((k for k in m if k.startswith("cons@")), None)
    return (
        name,
        f"{m['problems']} x {m['samples']}",
        _percent(m["pass@1"]),
        f"{_percent(interval[0])} - {_percent(interval[1])}" if interval else "-",
        f"{best}: {_percent(m[best])}" if best != "pass@1" else "-",
        f"{cons}: {_percent(m[cons])}" if cons else "-",
        _percent(m["truncated"]),
        f"{m['tokens']:.0f}",
        str(m["grader_failures"]),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
