"""Held-out pass@1 from graded rollouts (DeepSeek-R1, arXiv 2501.12948, section 3)."""

from __future__ import annotations

from statistics import mean, stdev

from r1kern.eval.metrics import pass_at_1
from r1kern.types import Rollout


def summarise(
    rollouts: list[Rollout], name: str = "held-out pass@1"
) -> tuple[dict[str, float], str]:
    """Metrics and a line that tells them.

    Samples whose grader failed count as wrong, and are counted apart.

    Args:
        rollouts: one graded group per problem, with the terms "accuracy" and "format".
        name: what the line calls pass@1.

    Returns:
        Metrics ("eval/pass@1" in [0, 1], its 95 % interval over problems, format rate, mean
        length, grader failures) and the line.
    """
    correct = [[s.terms.get("accuracy", 0.0) == 1.0 for s in r.scores] for r in rollouts]
    samples = [pair for r in rollouts for pair in zip(r.completions, r.scores, strict=True)]
    rate = pass_at_1(correct)
    per_problem = [mean(row) for row in correct]
    spread = stdev(per_problem) if len(per_problem) > 1 else 0.0
    half = 1.96 * spread / len(per_problem) ** 0.5
    metrics = {
        "eval/pass@1": rate,
        "eval/half_interval": half,
        "eval/format": mean(s.terms["format"] for _, s in samples),
        "eval/response_length": mean(len(c.ids) for c, _ in samples),
        "eval/grader_failures": float(sum(s.failure is not None for _, s in samples)),
    }
    line = (
        f"{name} {100 * rate:.1f} % (+- {100 * half:.1f}; {len(rollouts)} problems x "
        f"{len(correct[0])} samples), format {100 * metrics['eval/format']:.1f} %, "
        f"{metrics['eval/response_length']:.1f} tokens"
    )
    return metrics, line
