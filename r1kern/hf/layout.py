"""How many layers each pipeline stage holds."""

from __future__ import annotations

from r1kern.config import Parallel


def stage_layers(num_layers: int, parallel: Parallel) -> list[int]:
    """Transformer layers of each pipeline stage, `parallel.layers` or the default split.

    The default is even where the stages divide the layers.  Elsewhere embedding and head count as
    one layer each, and what remains is missing from the last stages, the head's first (61 layers
    on 16 stages: 3, 14 times 4, 2).

    Args:
        num_layers: of the model, without multi-token prediction; at least `parallel.pp`.
        parallel: its `layers`, if any, add up to `num_layers` (see `check_layout`).
    """
    if parallel.layers:
        return list(parallel.layers)
    stages = parallel.pp
    if num_layers % stages == 0:
        return [num_layers // stages] * stages
    share, rest = divmod(num_layers + 2, stages)
    counts = [share + (stage < rest) for stage in range(stages)]
    counts[0] -= 1
    counts[-1] -= 1
    while min(counts) < 1:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(min(counts))] += 1
    return counts


def megatron_layout(layers: list[int], mtp_layers: int) -> list[list[str]]:
    """`pipeline_model_parallel_layout` of these stages; multi-token prediction is on the last."""
    stages = [["decoder"] * count for count in layers]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * mtp_layers + ["loss"]
    return stages
