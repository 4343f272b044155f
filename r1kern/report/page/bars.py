"""Bars from zero: stacked over training steps, in rows, and points with intervals in rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from r1kern.report.page import axis
from r1kern.report.page.chart import BOTTOM, COLOURS, LEFT, RIGHT, TOP, figure, frame
from r1kern.report.page.series import Series
from r1kern.report.page.text import plural, safe, short

MOST_BARS = 100


def stacked(title: str, parts: Sequence[Series], unit: str) -> str:
    """What a whole is made of, step by step; series share their steps and are never negative."""
    parts = [s for s in parts if s.present]
    if not parts:
        return ""
    size = -(-len(parts[0].x) // MOST_BARS)
    bins = [slice(i, i + size) for i in range(0, len(parts[0].x), size)]
    heights = [[_mean(s.y[b]) for b in bins] for s in parts]
    last = [parts[0].x[b][-1] for b in bins]
    low, high = parts[0].x[0] - 1, last[-1]
    across = axis.steps(low, high, LEFT, RIGHT)
    sums = [sum(h[i] or 0.0 for h in heights) for i in range(len(bins))]
    up = axis.linear(0.0, max(sums), BOTTOM, TOP)
    floors = [0.0] * len(bins)
    body = [frame(across, up, "training step", unit)]
    for colour, column in enumerate(heights):
        d = []
        for i, height in enumerate(column):
            if height:
                x0, x1 = across(last[i] - _steps(parts[0].x[bins[i]])), across(last[i])
                top, floor = up(floors[i] + height), up(floors[i])
                d.append(f"M{x0:.1f} {floor:.1f}V{top:.1f}H{x1:.1f}V{floor:.1f}Z")
                floors[i] += height
        body.append(f'<path class="bar" style="--c:var(--c{colour % COLOURS})" d="{"".join(d)}"/>')
    values = {
        "left": across(low),
        "right": across(high),
        "low": low,
        "high": high,
        "percent": False,
        "series": [
            {"name": s.name, "x": last, "y": [None if v is None else float(f"{v:.7g}") for v in h]}
            for s, h in zip(parts, heights, strict=True)
        ],
    }
    note = f"Each bar: the mean of {plural(size, 'step')}." if size > 1 else ""
    return figure(title, [s.name for s in parts], body, values, note)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return fmean(present) if present else None


def _steps(xs: Sequence[int]) -> int:
    return xs[-1] - xs[0] + 1


def rows(title: str, amounts: Sequence[tuple[str, float]], *, unit: str, whole: float) -> str:
    """One bar for each (name, amount), as a share of `whole`."""
    if not amounts or whole <= 0:
        return ""
    lines = "".join(
        f'<div class="row"><span>{safe(name)}</span><div class="track">'
        f'<div style="width:{100 * min(max(amount / whole, 0.0), 1.0):.2f}%"></div></div>'
        f"<b>{short(amount)} {safe(unit)} <small>{100 * amount / whole:.1f} %</small></b></div>"
        for name, amount in amounts
    )
    return f'<figure class="rows"><figcaption>{safe(title)}</figcaption>{lines}</figure>'


Measured = tuple[str, float, tuple[float, float] | None]  # name, share of 1, its interval


def points(title: str, measured: Sequence[Measured], note: str) -> str:
    """One point for each, with its interval, on an axis from 0 to 100 %."""
    if not measured:
        return ""
    lines = []
    for name, value, interval in measured:
        bar = told = ""
        if interval is not None:
            low, high = (min(max(v, 0.0), 1.0) for v in interval)
            bar = f'<i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
            told = f" <small>{100 * low:.1f} to {100 * high:.1f}</small>"
        lines.append(
            f'<div class="row"><span>{safe(name)}</span><div class="track dot">{bar}'
            f'<em style="left:{100 * min(max(value, 0.0), 1.0):.2f}%"></em></div>'
            f"<b>{short(value, percent=True)}{told}</b></div>"
        )
    scale = "".join(f'<u style="left:{p}%">{p}</u>' for p in (0, 25, 50, 75, 100))
    return (
        f'<figure class="rows points"><figcaption>{safe(title)}</figcaption>{"".join(lines)}'
        f'<div class="row scale"><span></span><div>{scale}</div><b>%</b></div>'
        f"{f'<p>{safe(note)}</p>' if note else ''}</figure>"
    )
