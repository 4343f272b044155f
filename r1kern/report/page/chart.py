"""Line charts over training steps, as a `<figure>` of inline SVG with its values as JSON.

The values let the page tell them under the pointer; the picture itself needs no script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from r1kern.report.page import axis
from r1kern.report.page.axis import Axis
from r1kern.report.page.series import MOST_POINTS, Series, smoothed, thinned, window
from r1kern.report.page.text import brief, plural, safe

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 60, 408, 12, 196
COLOURS = 10  # --c0 ... --c9 of page.css


@dataclass(frozen=True)
class Style:
    """How a chart reads.

    Attributes:
        unit: of the vertical axis, written beside it.
        log: decades instead of a linear scale.
        zero: the axis holds 0 (linear scales only).
        percent: values are shares of 1.
        note: a sentence below.
        x: what the horizontal axis counts.
    """

    unit: str = ""
    log: bool = False
    zero: bool = True
    percent: bool = False
    note: str = ""
    x: str = "training step"


def line_chart(
    title: str, lines: Sequence[Series], style: Style, *, points: int = MOST_POINTS
) -> str:
    """A figure, or "" where no series has a value.

    Args:
        points: most points of a line; longer ones are binned, and the caption says so.
    """
    lines, more = lines[:COLOURS], len(lines[COLOURS:])
    below = sum(v <= 0 for s in lines for v in s.present) if style.log else 0
    lines = [thinned(s, points) for s in lines if s.present]
    if style.log:
        lines = [_positive(s) for s in lines]
        lines = [s for s in lines if s.present]
    if not lines:
        return ""
    xs = [x for s in lines for x in s.x]
    across = axis.steps(min(xs), max(xs), LEFT, RIGHT)
    up = _vertical(lines, style)
    body = [frame(across, up, style.x, style.unit)]
    body += [_line(s, across, up, i % COLOURS) for i, s in enumerate(lines)]
    values = {
        "left": across(across.low),
        "right": across(across.high),
        "low": across.low,
        "high": across.high,
        "percent": style.percent,
        "series": [_values(s) for s in lines],
    }
    title += " (log scale)" if style.log else ""
    return figure(title, [s.name for s in lines], body, values, _caption(lines, style, below, more))


def figure(title: str, names: Sequence[str], body: Sequence[str], values: dict, note: str) -> str:
    """A chart's frame: title, legend, picture, caption and the values under it."""
    legend = "".join(
        f'<span><i style="--c:var(--c{i % COLOURS})"></i>{safe(brief(name, 48))}</span>'
        for i, name in enumerate(names)
    )
    return (
        f'<figure class="chart" tabindex="0"><figcaption>{safe(title)}</figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(title)}">'
        f'{"".join(body)}<line class="cross" y1="{TOP}" y2="{BOTTOM}" hidden></line></svg>'
        f'<div class="tip" hidden></div>{f"<p>{safe(note)}</p>" if note else ""}'
        f"{embedded(values)}</figure>"
    )


def embedded(values: dict) -> str:
    """JSON that cannot end its element, whatever the names in it are."""
    text = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def frame(across: Axis, up: Axis, x_title: str, y_title: str) -> str:
    """Grid, ticks and titles of both axes."""
    parts = []
    for tick in up.ticks:
        y = f"{up(tick):.1f}"
        kind = "zero" if tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">'
            f"{up.label(tick)}</text>"
        )
    for tick in across.ticks:
        parts.append(
            f'<text class="tick" x="{across(tick):.1f}" y="{BOTTOM + 16}" text-anchor="middle">'
            f"{across.label(tick)}</text>"
        )
    middle = (TOP + BOTTOM) / 2
    parts.append(
        f'<text class="title" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{safe(x_title)}</text>"
        f'<text class="title" transform="translate(11 {middle}) rotate(-90)" '
        f'text-anchor="middle">{safe(y_title)}</text>'
    )
    return "".join(parts)


def _vertical(lines: list[Series], style: Style) -> Axis:
    values = [v for s in lines for v in (*s.present, *_extremes(s))]
    low, high = min(values), max(values)
    if style.log:
        return axis.decades(low, high, BOTTOM, TOP)
    if style.zero:
        low, high = min(0.0, low), max(0.0, high)
    if style.percent:
        low, high = max(low, -1.0), min(high, 1.0)
    return axis.linear(low, high, BOTTOM, TOP, percent=style.percent)


def _extremes(s: Series) -> list[float]:
    bounds = [v for v in (*s.low, *s.high) if v is not None]
    return bounds + [v for low, high in _interval(s) for v in (low, high)]


def _interval(s: Series) -> list[tuple[float, float]]:
    """Ends of the intervals of the values that have one."""
    pairs = zip(s.y, s.half, strict=True) if s.half else ()
    return [(y - h, y + h) for y, h in pairs if y is not None and h is not None]


def _positive(s: Series) -> Series:
    """What a log scale can show."""
    bounds = [tuple(v if v is not None and v > 0 else None for v in b) for b in (s.low, s.high)]
    y = tuple(v if v is not None and v > 0 else None for v in s.y)
    return Series(s.name, s.x, y, (), *bounds, s.bin)


def _line(s: Series, across: Axis, up: Axis, colour: int) -> str:
    parts = []
    if s.low:
        parts.append(f'<path class="band" d="{_area(s.x, s.low, s.high, across, up)}"/>')
    if s.half:
        low = [None if h is None or y is None else y - h for y, h in _pairs(s)]
        high = [None if h is None or y is None else y + h for y, h in _pairs(s)]
        parts.append(f'<path class="band" d="{_area(s.x, low, high, across, up)}"/>')
        parts.append(f'<path class="whisker" d="{_whiskers(s.x, low, high, across, up)}"/>')
    many = window(s) > 1
    parts.append(f'<path class="line" d="{_path(s.x, smoothed(s), across, up)}"/>')
    parts.append(f'<path class="{"raw" if many else "dots"}" d="{_dots(s.x, s.y, across, up)}"/>')
    return f'<g style="--c:var(--c{colour})">{"".join(parts)}</g>'


def _pairs(s: Series):
    return zip(s.y, s.half, strict=True)


def runs(values: Sequence[float | None]) -> list[range]:
    """Stretches without a missing value."""
    found, start = [], None
    for i, value in enumerate([*values, None]):
        if value is None and start is not None:
            found.append(range(start, i))
            start = None
        elif value is not None and start is None:
            start = i
    return found


def _path(x, y, across: Axis, up: Axis) -> str:
    return "".join(
        "M" + "L".join(f"{across(x[i]):.1f} {up(y[i]):.1f}" for i in run) for run in runs(y)
    )


def _dots(x, y, across: Axis, up: Axis) -> str:
    """Strokes of no length: their round caps are the points."""
    pairs = zip(x, y, strict=True)
    return "".join(f"M{across(a):.1f} {up(b):.1f}h0" for a, b in pairs if b is not None)


def _area(x, low, high, across: Axis, up: Axis) -> str:
    parts = []
    for run in runs([a if b is not None else None for a, b in zip(low, high, strict=True)]):
        there = "L".join(f"{across(x[i]):.1f} {_within(high[i], up):.1f}" for i in run)
        back = "L".join(f"{across(x[i]):.1f} {_within(low[i], up):.1f}" for i in reversed(run))
        parts.append(f"M{there}L{back}Z")
    return "".join(parts)


def _whiskers(x, low, high, across: Axis, up: Axis) -> str:
    return "".join(
        f"M{across(a):.1f} {_within(b, up):.1f}V{_within(c, up):.1f}"
        for a, b, c in zip(x, low, high, strict=True)
        if b is not None
    )


def _within(value: float, up: Axis) -> float:
    """An interval may reach beyond 0 or 100 %: it ends at the frame."""
    return up(min(max(value, up.low), up.high))


def _values(s: Series) -> dict:
    rounded = [None if y is None else float(f"{y:.7g}") for y in s.y]
    found = {"name": brief(s.name, 48), "x": s.x, "y": rounded}
    if s.half:
        found["half"] = [None if h is None else float(f"{h:.7g}") for h in s.half]
    return found


def _caption(lines: list[Series], style: Style, below: int, more: int) -> str:
    notes = [style.note] if style.note else []
    if more:
        notes.append(f"{plural(more, 'more line')} not drawn.")
    if below:
        notes.append(f"{plural(below, 'value')} of 0 or less cannot be shown on a log scale.")
    size = max(s.bin for s in lines)
    averaged = max(window(s) for s in lines)
    point = "every step"
    if size > 1:
        notes.append(f"Points: means of {plural(size, 'step')}; shade: least to greatest of them.")
        point = "every point"
    if averaged > 1:
        notes.append(f"Dots: {point}; line: centred mean of up to {averaged} points.")
    evaluations = max((len(s.present) for s in lines if s.spaced), default=0)
    if evaluations:
        notes.append(f"{plural(evaluations, 'evaluation')}, joined for the eye.")
    if any(_interval(s) for s in lines):
        notes.append("Shade: 95 % interval over problems.")
    return " ".join(notes)
