"""What the metrics of a GRPO step say of its rollouts and of its weight sync."""

from __future__ import annotations

from r1kern.generate.sync import SyncReport
from r1kern.model.sync_plan import SyncPlan
from r1kern.types import Rollout


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Rewards by term, pass rate, lengths and counts of one step's rollouts."""
    scored = [pair for r in rollouts for pair in zip(r.completions, r.scores, strict=True)]
    graded = [s for _, s in scored if s.failure is None]
    names = {name for s in graded for name in s.terms}
    flat = sum(len({s.total for s in r.scores if s.failure is None}) < 2 for r in rollouts)
    metrics = {
        "reward": mean([s.total for s in graded]),
        **{
            f"reward/{n}": mean([s.terms[n] for s in graded if n in s.terms]) for n in sorted(names)
        },
        "response_length": mean([len(c.ids) for c, _ in scored]),
        "truncated": mean([c.finish == "length" for c, _ in scored]),
        "zero_variance_groups": flat / len(rollouts),
        "grader_failures": float(len(scored) - len(graded)),
        "tokens": float(sum(len(c.ids) for c, _ in scored)),
    }
    if "accuracy" in names:
        metrics["pass_rate"] = metrics["reward/accuracy"]
    return metrics


def sync_metrics(report: SyncReport, plan: SyncPlan) -> dict[str, float]:
    """Bytes, speed and planned peak of one weight sync."""
    return {
        "sync_seconds": report.seconds,
        "sync_bytes": float(report.bytes),
        "sync_gb_per_s": report.bytes / report.seconds / 1e9,
        "sync_peak_bytes": float(plan.peak_bytes),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
