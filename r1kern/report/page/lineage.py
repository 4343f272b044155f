"""The stages of a pipeline as a graph, from top to bottom: who feeds whom, with counts."""

from __future__ import annotations

from r1kern.report.page.stages import STATES, Stage, feeds
from r1kern.report.page.text import brief, duration, safe, short

BOX_W, BOX_H, GAP_X, GAP_Y, PAD = 300, 92, 40, 46, 12
LANE = 26  # beside the boxes, for an edge that passes a layer


def lineage(stages: list[Stage]) -> str:
    """The picture; a stage stands below all that feed it."""
    edges = feeds(stages)
    layers = _layers(edges)
    long = [(a, b) for b, e in enumerate(edges) for a, _ in e if layers[b] - layers[a] > 1]
    left = PAD + LANE * len(long)
    places = _places(layers, left)
    parts = [_edges(b, edges[b], places, long) for b in range(len(stages))]
    parts += [
        _box(stage, places[i], i, external=_external(stage, stages, i))
        for i, stage in enumerate(stages)
    ]
    width = max((x for x, _ in places), default=0) + BOX_W + PAD
    height = max((y for _, y in places), default=0) + BOX_H + PAD
    return (
        f'<div class="lineage"><svg width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="Lineage of the stages">'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="head" d="M0 0L8 4L0 8Z"/></marker></defs>'
        f"{''.join(parts)}</svg></div>"
    )


def _layers(edges: list[list[tuple[int, str]]]) -> list[int]:
    """Longest way to each stage; one that nothing feeds stands right above what it feeds."""
    layers: list[int] = []
    for sources in edges:
        layers.append(max((layers[a] + 1 for a, _ in sources), default=0))
    for i, sources in enumerate(edges):
        fed = [layers[b] for b, e in enumerate(edges) if i in dict(e)]
        if not sources and fed:
            layers[i] = min(fed) - 1
    return layers


def _places(layers: list[int], left: int) -> list[tuple[int, int]]:
    taken: dict[int, int] = {}
    places = []
    for layer in layers:
        column = taken.get(layer, 0)
        taken[layer] = column + 1
        places.append((left + column * (BOX_W + GAP_X), PAD + layer * (BOX_H + GAP_Y)))
    return places


def _external(stage: Stage, stages: list[Stage], index: int) -> list[str]:
    """Inputs that no stage makes: data, base models."""
    fed = ", ".join(label for _, label in feeds(stages[: index + 1])[index]).split(", ")
    return [label for label in stage.inputs if label not in fed]


def _edges(target: int, sources: list[tuple[int, str]], places, long) -> str:
    parts = []
    for source, label in sources:
        (x0, y0), (x1, y1) = places[source], places[target]
        if (source, target) in long:
            lane = PAD + LANE * long.index((source, target)) + LANE / 2
            start, end = y0 + BOX_H + GAP_Y * 0.3, y1 - GAP_Y * 0.4  # in the gaps between layers
            d = f"M{x0 + 40} {y0 + BOX_H}V{start}H{lane}V{end}H{x1 + 40}V{y1 - 1}"
            where, label = "", ""  # lanes lie too close for words; the stage's tab has them
        else:
            a, b, y = x0 + BOX_W / 2, x1 + BOX_W / 2, (y0 + BOX_H + y1) / 2
            d = f"M{a} {y0 + BOX_H}C{a} {y} {b} {y} {b} {y1 - 1}"
            where = f'x="{(a + b) / 2 + 8}" y="{y + 4}" text-anchor="start"'
        parts.append(f'<path class="edge" d="{d}" marker-end="url(#head)"/>')
        if label:
            parts.append(f'<text class="on" {where}>{safe(brief(label, 34))}</text>')
    return "".join(parts)


def _box(stage: Stage, place: tuple[int, int], index: int, *, external: list[str]) -> str:
    x, y = place
    state = stage.state if stage.state in STATES else "pending"
    took = duration(stage.seconds) if stage.seconds is not None else ""
    counts = " · ".join(f"{label} {short(value)}" for label, value in stage.counts.items())
    lines = [
        (22, "name", brief(f"{index + 1}. {stage.name}", 36)),
        (41, "", brief(" · ".join(t for t in (stage.kind, stage.state, took) if t), 40)),
        (60, "", brief(counts or _taken(external), 40)),
        (79, "", brief(_told(stage), 40)),
    ]
    texts = "".join(
        f'<text class="{kind}" x="{x + 14}" y="{y + dy}">{safe(text)}</text>'
        for dy, kind, text in lines
        if text
    )
    about = f"{stage.name}; {_taken(external)}; {counts}"
    return (
        f'<g><title>{safe(brief(about, 400))}</title><rect class="node {state}" x="{x}" y="{y}" '
        f'width="{BOX_W}" height="{BOX_H}" rx="9"/>{texts}</g>'
    )


def _taken(external: list[str]) -> str:
    return f"takes {', '.join(external)}" if external else ""


def _told(stage: Stage) -> str:
    parts = []
    for label, (value, half, _) in stage.accuracy.items():
        spread = f" ± {100 * half:.1f}" if half is not None else ""
        parts.append(f"{label} {100 * value:.1f}{spread} %")
    return " · ".join(parts)
