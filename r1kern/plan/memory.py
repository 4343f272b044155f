"""Bytes of each rank by component and phase, and of each node's host.

Everything is bytes of one rank unless a name says node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from r1kern.config import TrainConfig
from r1kern.hf.flops import ModelFlops
from r1kern.kernels.head import LOGITS_BYTES
from r1kern.model.sync_plan import SyncPlan
from r1kern.plan.dry import Cost, Layout, Stage
from r1kern.plan.hardware import GPUS_PER_NODE, Assumptions

PHASES = ("rollout", "log-probs", "update", "optimizer step", "sync")

COMPONENTS = (
    "weights",
    "FP8 codes",
    "gradients",
    "optimizer",
    "activations",
    "logits head",
    "generator weights",
    "KV cache",
    "sync bucket",
    "framework",
)


@dataclass(frozen=True)
class Shapes:
    """What memory and time need to know of the model.

    Attributes:
        hidden, vocab, layers: sizes.
        dense_layers: the first layers, which have no experts.
        experts, topk: routed experts and those of a token (0 and 0 without).
        depths: of multi-token prediction, where it is trained.
        tied: the head is the embedding.
        parameters, expert_parameters: of the generator's model.
        flops: of a forward.
        kv_bytes: key-value cache of one token in all layers, on one rank of the generator.
        itemsize: bytes of a weight.
    """

    hidden: int
    vocab: int
    layers: int
    dense_layers: int
    experts: int
    topk: int
    depths: int
    tied: bool
    parameters: int
    expert_parameters: int
    flops: ModelFlops
    kv_bytes: int
    itemsize: int


def stage_costs(stage: int, layout: Layout, shapes: Shapes, costs: dict[str, Cost]) -> list[Cost]:
    """The pieces of a pipeline stage, in order."""
    first = sum(layout.layers[:stage])
    kinds = [
        "dense" if i < shapes.dense_layers else "moe"
        for i in range(first, first + layout.layers[stage])
    ]
    last = ["final", *["mtp"] * bool(shapes.depths), "head"]
    pieces = ["embedding"] * (stage == 0) + kinds + last * (stage == layout.pp - 1)
    return [costs[piece] for piece in pieces]


def states(config: TrainConfig, layout: Layout, stage: Stage, itemsize: int) -> dict[str, float]:
    """Weights, gradients and optimizer state; gradients are float32, as the moments.

    The distributed optimizer shards its state over the data-parallel ranks, for experts over the
    expert-data-parallel ones; float32 weights are their own master copy.
    """
    parameters = stage.dense + stage.expert
    shard = stage.dense / layout.dp + stage.expert / layout.expert_dp
    return {
        "weights": parameters * itemsize,
        "gradients": parameters * 4,
        "optimizer": shard * (8 if itemsize == 4 else 12),
        "shard": shard,
    }


def activations(pieces: list[Cost], in_flight: int) -> tuple[float, float]:
    """At the peak of an update under 1F1B, and of a pass without gradient."""
    saved = sum(piece.saved for piece in pieces)
    working = max(piece.working for piece in pieces)
    return saved * in_flight + working, max(piece.forward_peak for piece in pieces)


def logits_head(shapes: Shapes, tp: int, rows: int, *, device: str, gradient: bool) -> float:
    """Of the fused head: a chunk of logits, and both gradients with the sum of the weight's."""
    chunk = min(LOGITS_BYTES[device], rows * shapes.vocab / tp * shapes.itemsize)
    if not gradient:
        return chunk
    weight = shapes.vocab / tp * shapes.hidden
    # Rows of completions and their gradient, at every depth of multi-token prediction.
    held = rows * (1 + shapes.depths) * shapes.hidden * shapes.itemsize * 2
    return chunk + held + weight * (shapes.itemsize + 4)


def generator_weights(config: TrainConfig, shapes: Shapes) -> float:
    """One rank's shard of the generator's weights; FP8 blocks carry a float32 scale each."""
    itemsize = 1 + 4 / 128**2 if config.generator.fp8 else shapes.itemsize
    return shapes.parameters * itemsize / config.parallel.generator_tp


def by_phase(
    config: TrainConfig,
    layout: Layout,
    stage_index: int,
    stage: Stage,
    pieces: list[Cost],
    shapes: Shapes,
    assumed: Assumptions,
    *,
    sync: SyncPlan,
    microbatches: int,
    device: str = "cuda",
) -> dict[str, dict[str, float]]:
    """Bytes of one rank of a stage: phase -> component -> bytes."""
    own = states(config, layout, stage, shapes.itemsize)
    rows = config.train.tokens_per_microbatch
    in_flight = min(layout.pp - stage_index, microbatches)
    training, scoring = activations(pieces, in_flight)
    on_gpu = device == "cuda"
    is_last = stage_index == layout.pp - 1
    asleep = config.generator.sleep and on_gpu
    away = config.train.offload_in_rollout and on_gpu
    resident = {
        "weights": own["weights"],
        "gradients": own["gradients"],
        "optimizer": 0.0 if config.optim.offload and on_gpu else own["optimizer"],
        "framework": assumed.framework if on_gpu else 0.0,
    }
    generator = {
        "generator weights": generator_weights(config, shapes),
        "KV cache": config.generator.kv_cache_gib * 2**30,
    }
    lent = resident | ({"gradients": 0.0, "optimizer": 0.0} if away else {})
    kept = {} if asleep else generator
    codes = {"FP8 codes": sum(piece.codes for piece in pieces)}

    def head(gradient: bool) -> float:
        return logits_head(shapes, layout.tp, rows, device=device, gradient=gradient) * is_last

    slack = 1 + (assumed.fragmentation if on_gpu else 0)
    return {
        "rollout": lent | generator,
        "log-probs": resident
        | kept
        | codes
        | {"activations": scoring * slack, "logits head": head(False)},
        "update": resident
        | kept
        | codes
        | {"activations": training * slack, "logits head": head(True)},
        "optimizer step": resident
        | kept
        | {"activations": own["shard"] * 4 * (not config.optim.offload)},
        "sync": lent
        | {"generator weights": generator["generator weights"]}
        | ({} if asleep else {"KV cache": generator["KV cache"]})
        | {"sync bucket": sync.peak_bytes},
    }


def peak(phases: dict[str, dict[str, float]]) -> float:
    return max(sum(parts.values()) for parts in phases.values())


def host_node(
    config: TrainConfig, layout: Layout, stage: Stage, shapes: Shapes, assumed: Assumptions
) -> dict[str, float]:
    """Host memory of a node whose ranks all hold this stage, by component."""
    own = states(config, layout, stage, shapes.itemsize)
    ranks = min(GPUS_PER_NODE, layout.world)
    away = config.train.offload_in_rollout
    optimizer = own["optimizer"] if config.optim.offload or away else 0.0
    staging = (own["optimizer"] + own["weights"] / layout.dp) if config.train.async_save else 0.0
    return {
        "reference model": own["weights"] * ranks * (config.grpo.beta > 0),
        "optimizer": optimizer * ranks,
        "gradients": own["gradients"] * ranks * (away or config.optim.offload),
        "checkpoint staging": staging * ranks,
        "processes": assumed.host_process * ranks,
    }


def microbatches(config: TrainConfig, layout: Layout, mean_length: float) -> int:
    """Micro-batches of one update on each data-parallel rank, each of as many mean sequences."""
    sequences = config.rollout.prompts_per_step * config.rollout.group_size
    each = max(1, int(config.train.tokens_per_microbatch // mean_length))
    return math.ceil(sequences / config.grpo.updates_per_batch / each / layout.dp)
