"""Memory of one rank over the phases of a step, as SVG: stacked bars under the GPU's limit."""

from __future__ import annotations

import math
from pathlib import Path
from xml.sax.saxutils import escape

from r1kern.plan.make import Plan
from r1kern.plan.memory import COMPONENTS, PHASES

GiB = 2**30
COLOURS = (
    "#4e79a7", "#ff9da7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#b07aa1", "#edc948",
    "#9c755f", "#bab0ac",
)  # fmt: skip
LEFT, TOP, HEIGHT, WIDTH, LEGEND = 70, 60, 360, 560, 240


def draw(plan: Plan, path: str | Path) -> None:
    """Write the picture of the fullest stage's ranks."""
    phases, limit = plan.phases[plan.fullest], plan.gpu.memory
    top = 1.1 * max(limit, plan.peak)

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - value / top)

    parts = [
        f'<text x="{LEFT}" y="24" font-size="15">{escape(_title(plan))}</text>',
        f'<text x="{LEFT}" y="44" fill="#555">GiB of one GPU of pipeline stage {plan.fullest}, the '
        f"fullest; planned, not measured</text>",
        *_axis(top, y),
        *_bars(phases, y),
        _limit_line(LEFT, LEFT + WIDTH, y(limit)),
        *_totals(phases, y),
        *_legend(phases, f"{plan.gpu.name}: {limit / GiB:.1f} GiB"),
    ]
    size = f"{LEFT + WIDTH + LEGEND} {TOP + HEIGHT + 50}"
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _title(plan: Plan) -> str:
    model = Path(plan.config.model.path).name
    return f"{model} on {plan.layout.world} x {plan.gpu.name}, {plan.layout}"


def _axis(top: float, y) -> list[str]:
    decade = 10 ** math.floor(math.log10(top / GiB / 12))
    step = next(decade * s for s in (1, 2, 5, 10) if top / GiB / (decade * s) <= 12)
    lines, value = [], 0.0
    while value * GiB <= top:
        at = y(value * GiB)
        lines.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
        value += step
    return lines


def _bars(phases, y) -> list[str]:
    bars, width = [], WIDTH / len(PHASES)
    for i, phase in enumerate(PHASES):
        x, height = LEFT + i * width, 0.0
        for component, colour in zip(COMPONENTS, COLOURS, strict=True):
            value = phases[phase].get(component, 0.0)
            if value:
                bars.append(
                    f'<rect x="{x + 6:.1f}" y="{y(height + value):.1f}" width="{width - 12:.1f}" '
                    f'height="{y(height) - y(height + value):.1f}" fill="{colour}">'
                    f"<title>{phase}, {component}: {value / GiB:.2f} GiB</title></rect>"
                )
            height += value
    return bars


def _totals(phases, y) -> list[str]:
    """Sums above the bars, on white: the limit may run through them, and names below."""
    texts, width = [], WIDTH / len(PHASES)
    for i, phase in enumerate(PHASES):
        middle, total = LEFT + (i + 0.5) * width, sum(phases[phase].values())
        top = y(total)
        texts.append(
            f'<rect x="{middle - 18:.1f}" y="{top - 17:.1f}" width="36" height="15" fill="white"/>'
            f'<text x="{middle:.1f}" y="{top - 5:.1f}" text-anchor="middle">'
            f"{total / GiB:.1f}</text>"
            f'<text x="{middle:.1f}" y="{TOP + HEIGHT + 20}" text-anchor="middle">{phase}</text>'
        )
    return texts


def _limit_line(x1: float, x2: float, y: float) -> str:
    return (
        f'<line x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c00" stroke-width="2" '
        f'stroke-dasharray="6 4"/>'
    )


def _legend(phases, limit: str) -> list[str]:
    used = {c for parts in phases.values() for c, value in parts.items() if value}
    shown = [pair for pair in zip(COMPONENTS, COLOURS, strict=True) if pair[0] in used]
    x = LEFT + WIDTH + 20
    return [
        f'<rect x="{x}" y="{TOP + 22 * i}" width="14" height="14" fill="{colour}"/>'
        f'<text x="{x + 22}" y="{TOP + 22 * i + 12}">{component}</text>'
        for i, (component, colour) in enumerate(reversed(shown))
    ] + [
        _limit_line(x, x + 16, TOP + 22 * len(shown) + 15),
        f'<text x="{x + 22}" y="{TOP + 22 * len(shown) + 19}" fill="#c00">{escape(limit)}</text>',
    ]
