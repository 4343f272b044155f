"""Is the difference between two ways to train, over the same seeds, more than noise?"""

from __future__ import annotations

import math
import statistics

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def compare(rows: list[dict], name: str, figure: str) -> dict | None:
    """The mean of one precision less the baseline over the seeds that have both, and whether it is
    noise."""
    by_run = {(row["seed"], row["precision"]): row for row in rows}
    pairs = [
        (by_run[seed, "baseline"], row)
        for (seed, precision), row in by_run.items()
        if precision == name and (seed, "baseline") in by_run
    ]
    if len(pairs) < 2:
        return None
    differences = [fp8[figure] - baseline[figure] for baseline, fp8 in pairs]
    n, mean = len(pairs), statistics.mean(differences)
    half = T_95[min(n, len(T_95) + 1) - 2] * statistics.stdev(differences) / math.sqrt(n)
    errors = [row.get(f"{figure} error", 0.0) for pair in pairs for row in pair]
    evaluation = 1.96 * math.sqrt(sum(error**2 for error in errors)) / n
    return {
        "precision": name,
        "figure": figure,
        "seeds": n,
        "difference": mean,
        "paired_half_interval": half,
        "evaluation_half_interval": evaluation,
        "within_noise": abs(mean) <= max(half, evaluation),
    }
