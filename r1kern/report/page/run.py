"""A run's part of the page: what it was, key figures, charts, completions, configuration."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

from r1kern.report.page.records import Broken, string
from r1kern.report.page.run_charts import accuracies, learning, sections
from r1kern.report.page.run_data import RunData, read_run
from r1kern.report.page.sample_cards import sample_section
from r1kern.report.page.samples import read_samples
from r1kern.report.page.series import MOST_POINTS, Series
from r1kern.report.page.text import brief, clip, duration, plural, safe, short

CONFIG_SHOWN = 20_000  # characters


def run_section(folder: Path, *, runs: int = 1) -> str:
    """The HTML of one run.

    Args:
        runs: runs on the page; they share what room there is.
    """
    broken = Broken()
    run = read_run(folder, broken)
    points = max(100, MOST_POINTS // runs)
    steps, problems = (6, 3) if runs == 1 else (3, 2)
    samples = read_samples(folder, broken, steps=steps, problems=problems)
    cards = sum(len(g.chosen) for groups in samples.shown.values() for g in groups)
    longest = min(4000, 150_000 // max(1, cards * runs))
    others, constant = sections(run, points)
    parts = [("Learning", learning(run, samples, points)), *others.items()]
    notes = "".join(f'<p class="bad">{safe(note)}</p>' for note in broken.notes())
    charts = "".join(
        f'<h3>{title}</h3><div class="charts">{html}</div>' for title, html in parts if html
    )
    unchanged = ", ".join(f"{safe(brief(k, 60))} {short(v)}" for k, v in constant.items())
    return "".join(
        [
            facts(_facts(run)),
            notes,
            _tiles(run),
            charts,
            f"<p class=quiet>Never changed: {unchanged}.</p>" if constant else "",
            "<h3>Sampled completions</h3>" if samples.shown else "",
            _chosen_how(steps, problems) if samples.shown else "",
            sample_section(samples, longest=longest),
            _configuration(run),
        ]
    )


def facts(pairs: list[tuple[str, str]]) -> str:
    """A list of names and values; those without a value are left out."""
    rows = "".join(f"<dt>{safe(k)}</dt><dd>{safe(v)}</dd>" for k, v in pairs if v)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _chosen_how(steps: int, problems: int) -> str:
    return (
        f'<p class="quiet">Up to {steps} steps spread over the run, {problems} problems of each '
        "spread over its file, the same ones where files share them; of each problem the best, the "
        "median and the worst completion by reward. <mark>Marked</mark>: words of reflection.</p>"
    )


def what(run: RunData) -> str:
    """The kind of training, by its configuration."""
    if run.option("ppo") is not None:
        return "PPO"
    if run.option("grpo") is not None:
        return "GRPO"
    if run.option("data", "reads") is not None:
        return "Reward model"
    if run.option("rollout") is None and run.option("train", "batch_size") is not None:
        return "Supervised fine-tuning"
    return "Training"


def seconds(run: RunData) -> float:
    """Wall clock of all steps and evaluations on record."""
    columns = (run.columns, run.evaluations)
    return sum(v for c in columns for v in c.get("seconds/step", ()) if v is not None)


def progress(run: RunData) -> str:
    done = run.steps[-1] if run.steps else 0
    planned = run.option("train", "steps")
    if not isinstance(planned, int) or planned == done:
        return plural(done, "step")
    return f"{done} of {plural(planned, 'step')}: unfinished when this page was written"


def _facts(run: RunData) -> list[tuple[str, str]]:
    return [
        ("what", what(run)),
        ("model", _model(run)),
        ("data", _data(run)),
        ("steps", progress(run)),
        ("last step", f"{run.ended:%Y-%m-%d %H:%M %Z}" if run.ended else ""),
        ("wall clock", duration(seconds(run)) if run.steps else ""),
        ("layout", _layout(run)),
        ("machine", ", ".join(string(v) for v in run.machine.values() if string(v))),
    ]


def _model(run: RunData) -> str:
    path = brief(string(run.option("model", "path")), 120)
    start = {"random": "random weights of ", "load": ""}.get(
        string(run.option("model", "init")), ""
    )
    kind = string(run.model.get("model_type"))
    layers, hidden = run.model.get("num_hidden_layers"), run.model.get("hidden_size")
    shape = f"{kind}, {layers} layers, hidden size {hidden}" if kind and layers and hidden else kind
    dtype = string(run.option("model", "dtype"))
    return ", ".join(brief(t, 200) for t in (f"{start}{path}" if path else "", shape, dtype) if t)


def _data(run: RunData) -> str:
    train = brief(string(run.option("data", "train")), 120)
    held_out = brief(string(run.option("data", "eval")), 120)
    return f"{train}; held-out {held_out}" if held_out else train


def _layout(run: RunData) -> str:
    names = ("tp", "pp", "ep")
    sizes = [(n, string(run.option("parallel", n))) for n in names]
    return ", ".join(f"{n} {size}" for n, size in sizes if size)


def _tiles(run: RunData) -> str:
    tiles = [_accuracy(s) for s in accuracies(run)]
    for metric, name in (("reward", "Reward"), ("response_length", "Response length")):
        if metric in run.columns:
            tiles.append(_from_to(name, run.series(metric)))
    if "reward" not in run.columns and "loss" in run.columns:
        tiles.append(_from_to("Loss", run.series("loss")))
    tiles += [_total(run, "tokens", "Tokens"), _speed(run), _mismatch(run)]
    tiles.append(_total(run, "grader_failures", "Grader failures"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def tile(name: str, value: str, note: str = "") -> str:
    return (
        f'<div class="tile"><span>{safe(name)}</span><b>{safe(value)}</b>'
        f"<small>{safe(note)}</small></div>"
    )


def _accuracy(s: Series) -> str:
    measured = [i for i, y in enumerate(s.y) if y is not None]
    first, last = measured[0], measured[-1]
    best = max(measured, key=lambda i: s.y[i])

    def told(i: int) -> str:
        half = s.half[i]
        return f"{100 * s.y[i]:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")

    name = f"Held-out {s.name}"
    if first == last:
        return tile(name, f"{told(first)} %", f"after step {s.x[first]}")
    note = f"steps {s.x[first]} and {s.x[last]}; best {told(best)} % at {s.x[best]}"
    return tile(name, f"{told(first)} → {told(last)} %", note)


def _from_to(name: str, s: Series) -> str:
    present = s.present
    few = max(1, len(present) // 20)
    values = f"{short(fmean(present[:few]))} → {short(fmean(present[-few:]))}"
    span = f"first and last {plural(few, 'step')}" if few > 1 else "first and last step"
    return tile(name, values, f"{span}; {short(min(present))} to {short(max(present))} in all")


def _total(run: RunData, metric: str, name: str) -> str:
    if metric not in run.columns:
        return ""
    return tile(name, short(sum(run.series(metric).present)), "of all steps on record")


def _speed(run: RunData) -> str:
    if "tokens_per_s" not in run.columns:
        return ""
    return tile("Tokens / s", short(median(run.series("tokens_per_s").present)), "median of steps")


def _mismatch(run: RunData) -> str:
    if "max_mismatch" not in run.columns:
        return ""
    worst = max(run.series("max_mismatch").present)
    return tile("Greatest mismatch", short(worst), "of log-probs, trainer against generator")


def _configuration(run: RunData) -> str:
    if not run.config_text:
        return ""
    text, left = clip(run.config_text, CONFIG_SHOWN)
    more = f"\n… {plural(left, 'character')} left out" if left else ""
    return f"<details><summary>config.yaml</summary><pre>{safe(text)}{more}</pre></details>"
