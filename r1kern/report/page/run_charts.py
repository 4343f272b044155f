"""Which metrics share a chart, and how each reads."""

from __future__ import annotations

from dataclasses import replace

from r1kern.report.page.bars import rows, stacked
from r1kern.report.page.chart import Style, line_chart
from r1kern.report.page.run_data import RunData
from r1kern.report.page.samples import Samples
from r1kern.report.page.series import Series
from r1kern.report.page.text import plural, short

SHARE = Style(unit="%", percent=True)

# Section -> chart -> (metrics, style).  A metric that ends in "/" stands for all of that beginning.
CHARTS: dict[str, dict[str, tuple[tuple[str, ...], Style]]] = {
    "Optimisation": {
        "Loss": (("loss",), Style(unit="loss", zero=False)),
        "Gradient norm": (("grad_norm",), Style(unit="norm before clipping")),
        "Learning rate": (("lr",), Style(unit="learning rate")),
        "Expert load": (("expert_load",), Style(unit="fullest / mean expert")),
        "Lost to 0 in FP8": (("fp8_underflow",), replace(SHARE, unit="% of values")),
    },
    "Policy": {
        "KL to the reference policy": (("kl",), Style(unit="nats per token")),
        "Entropy": (("entropy",), Style(unit="nats per token")),
        "Clipped tokens": (
            ("clip_fraction", "clip_low_fraction", "clip_high_fraction"),
            replace(SHARE, unit="% of tokens"),
        ),
        "Probability ratio": (("ratio",), Style(unit="new / old policy", zero=False)),
        "Trainer against generator": (
            ("mismatch", "max_mismatch"),
            Style(unit="log-prob difference, nats", log=True),
        ),
    },
    "Value model": {
        "Values and returns": (("value/mean", "value/return"), Style(unit="reward")),
        "Explained variance": (("value/explained_variance",), Style(unit="share of 1")),
        "Advantages": (("advantage/mean", "advantage/std"), Style(unit="reward")),
    },
    "Speed and memory": {
        "Throughput": (("tokens_per_s",), Style(unit="tokens / s", note="All phases counted.")),
        "Tokens of a step": (("tokens",), Style(unit="tokens")),
        "Waste of packing": (("pack/padding", "pack/imbalance"), SHARE),
        "Host memory": (
            ("host/rss_gib", "host/available_gib"),
            Style(unit="GiB", note="rss: the fullest rank; available: the fullest machine."),
        ),
        "Device memory": (
            ("device/allocated_peak_gib", "device/reserved_peak_gib", "device/used_gib"),
            Style(unit="GiB, the fullest device"),
        ),
        "Power of a device": (("device/power_w",), Style(unit="W")),
        "Clock": (("device/sm_clock_mhz",), Style(unit="MHz, the slowest device")),
        "Temperature": (("device/temperature_c",), Style(unit="°C, the hottest device")),
        "Throttled devices": (("device/throttled/",), Style(unit="devices")),
        "Weight sync": (("sync_seconds",), Style(unit="s")),
        "Speed of the sync": (("sync_gb_per_s",), Style(unit="GB / s")),
    },
}
SHARES = {
    "pass_rate": "correct",
    "accuracy": "pairs ranked right",  # of a reward model
    "truncated": "cut off at the token limit",
    "zero_variance_groups": "groups without signal",
}
LEARNING = ("reward", "response_length", *SHARES)
ACCURACIES = ("pass@", "cons@", "accuracy")
MOST_OTHERS = 40


def learning(run: RunData, samples: Samples, points: int) -> str:
    """Reward by term, accuracy, length and reflection: what the paper's Figures 2 and 3 show."""
    terms = [k for k in run.columns if k.startswith("reward/")]
    rewards = [
        run.series(k, "total" if k == "reward" else k.removeprefix("reward/"))
        for k in ("reward", *terms)
        if k in run.columns
    ]
    length = [run.series(k, "training") for k in ("response_length",) if k in run.columns]
    if "response_length" in run.evaluations:
        length.append(run.evaluated("response_length", "held-out"))
    charts = [
        line_chart(
            "Reward by term",
            rewards,
            Style(unit="mean reward", note="Terms unweighted; total as weighted."),
            points=points,
        ),
        line_chart("Held-out accuracy", accuracies(run), SHARE),
        line_chart("Response length", length, Style(unit="tokens, mean"), points=points),
        line_chart(
            "Training samples",
            [run.series(k, name) for k, name in SHARES.items() if k in run.columns],
            SHARE,
            points=points,
        ),
        *_reflection(samples, points),
    ]
    return "".join(charts)


def accuracies(run: RunData) -> list[Series]:
    """pass@1 with its interval, pass@k, cons@k of held-out problems; accuracy on held-out pairs."""
    names = [k for k in run.evaluations if k.startswith(ACCURACIES)]
    return [run.evaluated(k, half="half_interval" if k == "pass@1" else "") for k in names]


def _reflection(samples: Samples, points: int) -> list[str]:
    if not samples.steps:
        return []
    looked = len(samples.steps)
    note = f"Of {plural(looked, 'step')}" + (
        f" of the {samples.files} on disk." if looked < samples.files else " on disk."
    )
    if samples.partly:
        note += " Large files in part."
    steps = tuple(samples.steps)
    if not any(samples.words):
        return [
            '<figure class="chart"><figcaption>Words of reflection</figcaption><p>No response says '
            f"“wait”, “re-evaluate” or their like. {note}</p></figure>"
        ]
    words = Series("words of reflection in a response", steps, tuple(samples.words))
    share = Series("responses with one or more", steps, tuple(samples.share))
    return [
        line_chart(
            "Words of reflection",
            [words],
            Style(unit="in a response, mean", note=note),
            points=points,
        ),
        line_chart("Responses that reflect", [share], replace(SHARE, note=note), points=points),
    ]


def sections(run: RunData, points: int) -> tuple[dict[str, str], dict[str, float]]:
    """The other charts by section, and the metrics that never change, with their value."""
    told = {k for k in run.columns if k.startswith(("reward/", "seconds/")) or k in LEARNING}
    found, constant = {}, {}
    for section, charts in CHARTS.items():
        html = []
        for title, (names, style) in charts.items():
            metrics = _matching(names, run)
            told.update(metrics)
            if all(_constant(run.columns[m]) for m in metrics):
                constant |= {m: run.columns[m][-1] for m in metrics}
                continue
            lines = [run.series(m, m.rpartition("/")[2]) for m in metrics]
            html.append(line_chart(title, lines, style, points=points))
        found[section] = "".join(html)
    found["Speed and memory"] = _time(run) + found["Speed and memory"]
    rest = [k for k in run.columns if k not in told]
    constant |= {m: run.columns[m][-1] for m in rest if _constant(run.columns[m])}
    shown = [m for m in rest if m not in constant]
    html = [line_chart(m, [run.series(m)], Style(), points=points) for m in shown[:MOST_OTHERS]]
    others = [k for k in run.evaluations if not k.startswith((*ACCURACIES, "seconds/"))]
    others = [k for k in others if k not in ("half_interval", "response_length")]
    for metric in others[:MOST_OTHERS]:
        if _constant(run.evaluations[metric]):
            constant[f"eval/{metric}"] = run.evaluations[metric][-1]
        else:
            html.append(line_chart(f"Held-out: {metric}", [run.evaluated(metric)], Style()))
    left = len(shown[MOST_OTHERS:]) + len(others[MOST_OTHERS:])
    if left:
        html.append(f"<p>{plural(left, 'more metric')} in metrics.jsonl</p>")
    found["Other metrics"] = "".join(html)
    return found, constant


def _matching(names: tuple[str, ...], run: RunData) -> list[str]:
    return [
        metric
        for name in names
        for metric in run.columns
        if metric == name or (name.endswith("/") and metric.startswith(name))
    ]


def _constant(values: tuple[float | None, ...]) -> bool:
    return len(values) > 1 and None not in values and len(set(values)) == 1


def _time(run: RunData) -> str:
    """Seconds by phase: over the steps, and in all with the evaluations'."""
    prefix = "seconds/"
    phases = {
        k.removeprefix(prefix): sum(v for v in run.columns[k] if v is not None)
        for k in run.columns
        if k.startswith(prefix) and k != "seconds/step"
    }
    order = sorted(phases, key=phases.get, reverse=True)
    top, rest = (order, []) if len(order) <= 9 else (order[:8], order[8:])
    lines = [run.series(prefix + k, k) for k in top]
    if rest:
        columns = [run.columns[prefix + k] for k in rest]
        sums = tuple(
            sum(v for v in row if v is not None) if any(v is not None for v in row) else None
            for row in zip(*columns, strict=True)
        )
        lines.append(Series("the rest", run.steps, sums))
    whole = dict(phases)
    for key, values in run.evaluations.items():
        if key.startswith(prefix) and key != "seconds/step":
            name = key.removeprefix(prefix)
            whole[name] = whole.get(name, 0.0) + sum(v for v in values if v is not None)
    amounts = sorted(whole.items(), key=lambda pair: -pair[1])
    total = sum(whole.values())
    return stacked("Time by phase", lines, "s of a step") + rows(
        f"Time by phase, {short(total)} s in all", amounts[:12], unit="s", whole=total
    )
