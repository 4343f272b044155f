"""Rows of the benchmark as a line on the screen and as a table in Markdown."""

from __future__ import annotations

HEADINGS = (
    *("op", "shape", "p20 / p50 / p80 us", "rate", "% of measured limit", "% of datasheet"),
    *("peak MiB", "results MiB", "times faster than", "DeepGEMM's own figure, H800", "date"),
)


def line(row: dict) -> str:
    """One line on the screen."""
    name = f"{row['case']:17s} {row['shape']}"
    if "failed" in row:
        return f"{name}  FAILED: {row['failed']}"
    if "passed" in row:
        return f"{name}  ok"
    figures = " | ".join(_cells(row)[2:6])
    return f"{name}  {figures} | {_ratios(row)}"


def markdown(rows: list[dict]) -> str:
    """The table, the reasons for absent baselines, and the machine of each set of rows."""
    lines = [_joined(HEADINGS), _joined(["---"] * len(HEADINGS)), *map(_joined, map(_cells, rows))]
    absent = {
        f"{name}: {rival['absent']}"
        for row in rows
        for name, rival in row.get("baselines", {}).items()
        if "absent" in rival
    }
    machines = dict.fromkeys(_machine(row) for row in rows)
    notes = "".join(f"- {note}\n" for note in [*sorted(absent), *machines])
    return "\n".join(lines) + f"\n\n{notes}"


def _cells(row: dict) -> list[str]:
    if "failed" in row:
        blank = [""] * (len(HEADINGS) - 4)
        return [row["case"], row["shape"], f"FAILED: {row['failed']}", *blank, row["date"]]
    datasheet = row.get("percent_of_datasheet")
    return [
        row["case"],
        row["shape"],
        " / ".join(f"{us:,.1f}" for us in row["us"]),
        _rate(row),
        f"{row['percent_of_measured']:.1f}",
        "-" if datasheet is None else f"{datasheet:.1f}",
        f"{row['peak_mib']:,.1f}",
        f"{row['results_mib']:,.1f}",
        _ratios(row),
        row.get("published", ""),
        row["date"],
    ]


def _rate(row: dict) -> str:
    digits = 0 if row["rate"] >= 100 else 2
    return f"{row['rate']:,.{digits}f} {row['unit']}"


def _ratios(row: dict) -> str:
    shown = []
    for name, rival in row["baselines"].items():
        if "absent" in rival:
            shown.append(f"{name}: absent")
        else:
            shown.append(f"{name} {rival['times_ours']:.2f} ({rival['peak_mib']:,.0f} MiB)")
    return "; ".join(shown)


def _machine(row: dict) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
    driver = f", driver {row['driver']}, CUDA {row['cuda']}" if row["driver"] else ""
    return (
        f"{row['date']}: {row['device']}{driver}, {row['threads']} CPU threads; {versions}; "
        f"sources {row['source']}"
    )


def _joined(cells) -> str:
    return "| " + " | ".join(cells) + " |"
