"""Sampled completions of a run: which are shown, and how often responses reflect.

A few steps spread over the run; of a step's file a few problems, those that most of the chosen
files share, spread over the file; of a problem's group the best, the median and the worst by
reward.  Nothing is picked for its looks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from r1kern.report.page.records import (
    Broken,
    mapping,
    number,
    numbers,
    read_lines,
    spread,
    string,
)
from r1kern.report.page.reflection import reflections

MOST_FILES = 120  # looked through for words of reflection
MOST_BYTES = 128 * 2**20  # read in all; each file gets its share, of which it shows whole lines


@dataclass(frozen=True)
class Sample:
    """One completion as a file has it; what is missing there is empty here."""

    group: str
    problem: str
    question: str
    answer: str
    text: str
    tokens: int
    finish: str
    terms: dict[str, float]
    total: float | None
    failure: str


@dataclass(frozen=True)
class Group:
    """Some of a problem's completions, each with its place among all of them."""

    size: int
    chosen: list[tuple[str, Sample]]


@dataclass
class Samples:
    """What the page tells of a run's completions.

    Attributes:
        shown: chosen groups by label of their file, in order.
        steps, words, share: of each training file looked through: its step, the mean number of
            words of reflection in a response, the share of responses with one or more.
        partly: a file was too large to be read whole.
        files: training files there are.
    """

    shown: dict[str, list[Group]] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    partly: bool = False
    files: int = 0


def read_samples(folder: Path, broken: Broken, *, steps: int, problems: int) -> Samples:
    """Of a run's `rollouts/`.

    Args:
        steps: training steps, and evaluations, to show completions of.
        problems: problems to show of each.
    """
    training, held_out = _files(folder, "step_"), _files(folder, "eval_")
    found = Samples(files=len(training))
    looked = spread(sorted(training), MOST_FILES)
    shown = spread(looked, steps)
    share = MOST_BYTES // max(1, len(looked) + steps)
    kept: dict[int, list[list[Sample]]] = {}
    for step in looked:
        groups = _groups(training[step], broken, share)
        found.partly |= training[step].stat().st_size > share
        counts = [len(reflections(s.text)) for group in groups for s in group]
        if counts:
            found.steps.append(step)
            found.words.append(fmean(counts))
            found.share.append(fmean(c > 0 for c in counts))
        if step in shown:
            kept[step] = groups
    evaluated = {
        done: _groups(held_out[done], broken, share) for done in spread(sorted(held_out), steps)
    }
    for done, groups in _choose(evaluated, problems).items():
        found.shown[f"Held-out problems after {done} steps"] = groups
    for step, groups in _choose(kept, problems).items():
        found.shown[f"Training step {step}"] = groups
    return found


def _files(folder: Path, prefix: str) -> dict[int, Path]:
    paths = (folder / "rollouts").glob(f"{prefix}*.jsonl")
    named = [(path.stem.removeprefix(prefix), path) for path in paths]
    return {int(n): path for n, path in named if n.isascii() and n.isdigit()}


def _groups(path: Path, broken: Broken, limit: int) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for record in read_lines(path, broken, limit=limit):
        sample = _sample(record)
        groups.setdefault(sample.group, []).append(sample)
    return list(groups.values())


def _sample(record: dict) -> Sample:
    ids = record.get("ids")
    return Sample(
        group=string(record.get("group")),
        problem=string(record.get("id")),
        question=string(record.get("question")) or string(record.get("prompt")),
        answer=string(record.get("answer")),
        text=string(record.get("completion")),
        tokens=len(ids) if isinstance(ids, list) else 0,
        finish=string(record.get("finish")),
        terms=numbers(mapping(record.get("terms"))),
        total=number(record.get("total")),
        failure=string(record.get("failure")),
    )


def _choose(files: dict[int, list[list[Sample]]], problems: int) -> dict[int, list[Group]]:
    occurs: dict[str, int] = {}
    for groups in files.values():
        for problem in {group[0].problem for group in groups}:
            occurs[problem] = occurs.get(problem, 0) + 1
    chosen = {}
    for step, groups in files.items():
        most = max((occurs[g[0].problem] for g in groups), default=0)
        pool = [g for g in groups if occurs[g[0].problem] == most]
        chosen[step] = [_best_median_worst(g) for g in spread(pool, problems)]
    return {step: groups for step, groups in chosen.items() if groups}


def _best_median_worst(group: list[Sample]) -> Group:
    """By total reward; those that a grader failed on are told as such."""
    graded = sorted(
        (s for s in group if not s.failure and s.total is not None), key=lambda s: -s.total
    )
    failed = [("grader failed", s) for s in group if s.failure][:1]
    if not graded:
        rest = [("not graded", s) for s in group if not s.failure][:1]
        return Group(len(group), failed or rest)
    if graded[0].total == graded[-1].total:
        label = f"all {len(graded)} alike in reward" if len(graded) > 1 else "the only one"
        return Group(len(group), [(label, graded[0]), *failed])
    picks = [("best", graded[0])]
    if len(graded) > 2:
        picks.append(("median", graded[len(graded) // 2]))
    return Group(len(group), [*picks, ("worst", graded[-1]), *failed])
