"""A pipeline's page: lineage, counts, drop reasons, each stage's accuracy, and its run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from r1kern.report.page.bars import points, rows
from r1kern.report.page.lineage import lineage
from r1kern.report.page.records import string
from r1kern.report.page.run import facts, run_section
from r1kern.report.page.run_data import is_run
from r1kern.report.page.stages import PIPELINE, STATES, Stage, read_stages
from r1kern.report.page.text import NONE, brief, duration, safe, short

NOT = (None, None, "")  # measured


def pipeline_tabs(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """The pipeline's name and its tabs: an overview, then one for each stage."""
    about, stages = read_stages(folder)
    with_run = [s for s in stages if s.run is not None and is_run(s.run)]
    tabs = [("Overview", _overview(about, stages))]
    tabs += [
        (f"{i}. {brief(s.name, 40)}", _stage(s, runs=len(with_run), run=s in with_run))
        for i, s in enumerate(stages, start=1)
    ]
    return brief(string(about.get("name")), 120), tabs


def _overview(about: dict, stages: list[Stage]) -> str:
    if not stages:
        return f'<p class="bad">{PIPELINE} holds no stages: cut short, or nothing has begun.</p>'
    states = [sum(s.state == state for s in stages) for state in STATES]
    told = ", ".join(f"{n} {state}" for n, state in zip(states, STATES, strict=True) if n)
    took = sum(s.seconds for s in stages if s.seconds is not None)
    known = [("started", brief(string(about.get("started")), 40)), ("stages", told)]
    known.append(("time of the stages", duration(took) if took else ""))
    return "".join(
        [
            facts(known),
            f"<h3>Lineage</h3>{lineage(stages)}",
            _accuracies(stages),
            f"<h3>Stages</h3>{_table(stages)}",
            _all_dropped(stages),
        ]
    )


def _accuracies(stages: list[Stage]) -> str:
    """One chart for each thing that several stages measured, and one for all the others."""
    counts = Counter(label for s in stages for label in s.accuracy)
    shared = [label for label in counts if counts[label] > 1]
    charts = [
        _chart(f"pass@1, {label}", [(s.name, s.accuracy.get(label, NOT)) for s in stages])
        for label in shared
    ]
    single = [
        (f"{s.name}: {label}", measured)
        for s in stages
        for label, measured in s.accuracy.items()
        if label not in shared
    ]
    charts += [_chart("pass@1", single)] if single else []
    if not charts:
        return ""
    return f'<h3>Measured accuracy</h3><div class="charts">{"".join(charts)}</div>'


def _chart(title: str, entries: list[tuple[str, tuple]]) -> str:
    """A row for each entry that was measured."""
    measured, sizes = [], set()
    for name, (value, half, size) in entries:
        if value is not None:
            interval = None if half is None else (value - half, value + half)
            measured.append((name, value, interval))
            sizes.add(size)
    notes = [" or ".join(sorted(filter(None, sizes)))]
    notes += ["bar: 95 % interval"] if any(interval for *_, interval in measured) else []
    return points(title, measured, "; ".join(filter(None, notes)))


def _table(stages: list[Stage]) -> str:
    labels = list(dict.fromkeys(label for s in stages for label in s.accuracy))
    head = "".join(f'<th class="n">{safe(label)}</th>' for label in labels)
    body = "".join(
        f'<tr><td><a href="#tab-{i}">{i}. {safe(brief(s.name, 60))}</a></td>'
        f"<td>{safe(brief(s.kind, 30))}</td>{_state(s)}"
        f'<td class="n">{duration(s.seconds) if s.seconds is not None else NONE}</td>'
        f"<td>{safe(', '.join(f'{k} {short(v)}' for k, v in s.counts.items()) or NONE)}</td>"
        f'<td class="n">{short(sum(s.dropped.values())) if s.dropped else NONE}</td>'
        f"{''.join(_cell(s, label) for label in labels)}</tr>"
        for i, s in enumerate(stages, start=1)
    )
    return (
        '<div class="table"><table><tr><th>stage</th><th>kind</th><th>state</th>'
        '<th class="n">time</th><th>counts</th><th class="n">dropped</th>'
        f"{head}</tr>{body}</table></div>"
    )


def _state(stage: Stage) -> str:
    name = stage.state if stage.state in STATES else "pending"
    return f'<td class="state-{name}">{safe(brief(stage.state, 30) or NONE)}</td>'


def _cell(stage: Stage, label: str) -> str:
    if label not in stage.accuracy:
        return f'<td class="n">{NONE}</td>'
    value, half, _ = stage.accuracy[label]
    spread = f" <small>± {100 * half:.1f}</small>" if half is not None else ""
    return f'<td class="n">{short(value, percent=True)}{spread}</td>'


def _all_dropped(stages: list[Stage]) -> str:
    charts = "".join(_dropped(s, title=s.name) for s in stages)
    return f'<h3>What the filters dropped</h3><div class="charts">{charts}</div>' if charts else ""


def _dropped(stage: Stage, *, title: str) -> str:
    amounts = sorted(stage.dropped.items(), key=lambda pair: -pair[1])
    whole = sum(amount for _, amount in amounts)
    return rows(f"{title}: {short(whole)} dropped", amounts, unit="", whole=whole)


def _stage(stage: Stage, *, runs: int, run: bool) -> str:
    state = ", ".join(t for t in (stage.kind, stage.state) if t)
    known = [
        ("stage", state),
        ("time", duration(stage.seconds) if stage.seconds is not None else ""),
        *((f"takes {k}", brief(v, 200)) for k, v in stage.inputs.items()),
        *((f"makes {k}", brief(v, 200)) for k, v in stage.outputs.items()),
        *((k, short(v)) for k, v in stage.counts.items()),
        *((f"pass@1, {k}", _accuracy(*entry)) for k, entry in stage.accuracy.items()),
    ]
    notes = "".join(f"<p>{safe(brief(note, 1000))}</p>" for note in stage.notes)
    missing = ""
    if stage.run is not None and not run:
        missing = f'<p class="quiet">Its run {safe(stage.run.name)} has written nothing yet.</p>'
    return "".join(
        [
            facts(known),
            notes,
            _dropped(stage, title="Filters") if stage.dropped else "",
            f"<h3>Its run</h3>{run_section(stage.run, runs=runs)}" if run else missing,
        ]
    )


def _accuracy(value: float, half: float | None, size: str) -> str:
    spread = f" ± {100 * half:.1f}" if half is not None else ""
    return f"{100 * value:.1f}{spread} %" + (f" ({size})" if size else "")
