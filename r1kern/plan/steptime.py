"""Modelled seconds of a step, by phase.  Nothing here is measured: every figure is *modelled*.

Decoding is bound by memory traffic, training by matrix products, sync by the network; the shares of
the hardware's peaks that are reached are assumptions (`hardware.Assumptions`), one set for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from r1kern.config import TrainConfig
from r1kern.model.sync_plan import SyncPlan
from r1kern.plan.dry import Cost, Layout, Stage
from r1kern.plan.hardware import GPU, GPUS_PER_NODE, Assumptions, transfer_s
from r1kern.plan.memory import Shapes, microbatches, states
from r1kern.plan.trace import Work

POINTS = 64  # of the numerical integral over the decoding steps


@dataclass(frozen=True)
class Lengths:
    """Tokens of a mean prompt, of a mean completion and of the completion budget."""

    prompt: float
    response: float
    budget: int

    @property
    def total(self) -> float:
        return self.prompt + self.response


@dataclass(frozen=True)
class Machine:
    gpu: GPU
    assumed: Assumptions


def step_seconds(
    config: TrainConfig,
    layout: Layout,
    stages: list[Stage],
    pieces: list[list[Cost]],
    shapes: Shapes,
    sync: SyncPlan,
    lengths: Lengths,
    machine: Machine,
) -> dict[str, float]:
    """Modelled seconds of each phase; their sum is the step.

    Args:
        pieces: `memory.stage_costs` of each stage.
    """
    count = microbatches(config, layout, lengths.total)
    updates = config.grpo.updates_per_batch
    forward = max(_pass_s(config, layout, p, shapes, machine, "forward") for p in pieces)
    both = max(_pass_s(config, layout, p, shapes, machine, "both") for p in pieces)
    scoring = (updates * count + layout.pp - 1) * forward
    own = [states(config, layout, stage, shapes.itemsize) for stage in stages]
    weights = max(s["weights"] for s in own)
    codes = max(sum(piece.codes for piece in p) for p in pieces)
    swap = 2 * 2 * weights / _pcie(machine)  # reference in and out, each both ways
    return {
        "rollout": rollout_s(config, layout, shapes, lengths, machine),
        "old log-probs": scoring if updates > 1 else 0.0,
        "reference log-probs": (scoring + swap) if config.grpo.beta > 0 else 0.0,
        "update": updates * (count + layout.pp - 1) * both
        + updates
        * max(_finish_s(config, layout, s, o, machine) for s, o in zip(stages, own, strict=True))
        + updates * _quantise_s(codes, shapes, machine),
        "sync": sync_s(layout, sync, machine),
        "sleep and wake": _offload_s(config, own, machine),
    }


# -- rollout --------------------------------------------------------------------------------


def rollout_s(
    config: TrainConfig, layout: Layout, shapes: Shapes, lengths: Lengths, machine: Machine
) -> float:
    """Prefill, then decoding until the last completion ends.

    Completion lengths have the distribution of most entropy on [0, budget] with the given mean.
    """
    width = config.parallel.generator_tp
    engines = layout.world // width
    sequences = math.ceil(config.rollout.prompts_per_step * config.rollout.group_size / engines)
    room = config.generator.kv_cache_gib * 2**30 / shapes.kv_bytes
    at_once = max(1, min(sequences, config.generator.max_seqs, int(room / lengths.total)))
    waves = sequences / at_once
    step = lengths.budget / POINTS
    seconds = sequences * _prefill_s(config, shapes, lengths.prompt, machine)
    for i in range(POINTS):
        position = (i + 0.5) * step
        alive = max(1.0, at_once * survival(position, lengths))
        context = lengths.prompt + position
        seconds += waves * step * _decode_s(config, shapes, alive, context, machine)
    return seconds


def survival(position: float, lengths: Lengths) -> float:
    """Share of completions longer than `position`: truncated exponential with the given mean."""
    budget, mean = lengths.budget, min(lengths.response, 0.99 * lengths.budget)
    low, high = -50.0, 50.0  # rate in units of 1 / budget
    for _ in range(60):
        rate = (low + high) / 2
        got = 0.5 if abs(rate) < 1e-9 else 1 / rate - 1 / math.expm1(rate)
        low, high = (rate, high) if got > mean / budget else (low, rate)
    x = position / budget
    if abs(rate) < 1e-6:
        return 1 - x
    return (math.exp(-rate * x) - math.exp(-rate)) / (1 - math.exp(-rate))


def _prefill_s(config, shapes: Shapes, tokens: float, machine: Machine) -> float:
    """Matrix products of a prompt (no prefix cache: each completion's prompt by itself)."""
    gpu, assumed = machine.gpu, machine.assumed
    peak = gpu.fp8 if config.generator.fp8 else gpu.bf16
    flops = shapes.flops.sequence(math.ceil(tokens), 1)
    return flops / config.parallel.generator_tp / (peak * assumed.gemm)


def _decode_s(config, shapes: Shapes, batch: float, context: float, machine: Machine) -> float:
    """One decoding step of an engine."""
    gpu, assumed = machine.gpu, machine.assumed
    width = config.parallel.generator_tp
    itemsize = 1 if config.generator.fp8 else shapes.itemsize
    touched = 1 - (1 - shapes.topk / shapes.experts) ** batch if shapes.experts else 0.0
    weights = (shapes.parameters - shapes.expert_parameters) + touched * shapes.expert_parameters
    read = weights * itemsize / width + batch * context * shapes.kv_bytes
    peak = gpu.fp8 if config.generator.fp8 else gpu.bf16
    flops = shapes.flops.token + shapes.flops.head
    compute = flops * batch / width / (peak * assumed.gemm)
    launches = shapes.layers * assumed.eager_launches * assumed.launch_s
    busy = max(
        read / (gpu.bandwidth * assumed.decode_memory),
        compute,
        launches * config.generator.enforce_eager,
    )
    # Two all-reduces a layer, each a reduce-scatter and an all-gather of the hidden states.
    message = 2 * 2 * shapes.layers * batch * shapes.hidden * 2
    return busy + transfer_s(gpu, assumed, message, width, 2 * shapes.layers * (width > 1))


# -- training -------------------------------------------------------------------------------


def _pass_s(
    config, layout: Layout, pieces: list[Cost], shapes: Shapes, machine, kind: str
) -> float:
    """One micro-batch through one stage."""
    seconds = sum(work_s(piece.forward, machine) for piece in pieces)
    if kind == "both":
        seconds += sum(work_s(piece.backward, machine) for piece in pieces)
    rows = config.train.tokens_per_microbatch
    if layout.pp > 1:
        message = rows / layout.tp * shapes.hidden * shapes.itemsize
        far = machine.gpu.nic if layout.world > GPUS_PER_NODE else machine.gpu.nvlink
        seconds += (2 if kind == "both" else 1) * message / (far * machine.assumed.links)
    return seconds


def work_s(work: Work, machine: Machine) -> float:
    """Products, other operators and collectives one after another, or the host if it is slower."""
    gpu, assumed = machine.gpu, machine.assumed
    products = (work.flops / gpu.bf16 + work.fp8_flops / gpu.fp8) / assumed.gemm
    attention = work.attention_flops / (gpu.bf16 * assumed.attention)
    rest = work.moved / (gpu.bandwidth * assumed.memory)
    exchange = sum(
        transfer_s(gpu, assumed, sent, ranks, work.calls[name, ranks])
        for (name, ranks), sent in work.traffic.items()
    )
    slowest = assumed.imbalance if any("alltoall" in name for name, _ in work.traffic) else 1.0
    return max(slowest * products + attention + rest, work.kernels * assumed.launch_s) + exchange


def _finish_s(config, layout: Layout, stage: Stage, own: dict, machine: Machine) -> float:
    """Gradients summed over replicas, the optimizer's step, new weights gathered."""
    gpu, assumed = machine.gpu, machine.assumed
    seconds = 0.0
    for parameters, ranks in ((stage.dense, layout.dp), (stage.expert, layout.expert_dp)):
        if ranks > 1 and parameters:
            sent = parameters * (4 + own["weights"] / own["gradients"] * 4)
            far = gpu.nic if layout.world > GPUS_PER_NODE else gpu.nvlink
            seconds += sent * (ranks - 1) / ranks / (far * assumed.links)
    traffic = own["shard"] * 30  # gradient, master and two moments read, three written, weight
    if config.optim.offload:
        ranks = min(GPUS_PER_NODE, layout.world)
        return (
            seconds + own["shard"] * 6 / _pcie(machine) + traffic * ranks / assumed.adam_bytes_per_s
        )
    return seconds + traffic / (gpu.bandwidth * assumed.memory)


def _quantise_s(codes: float, shapes: Shapes, machine: Machine) -> float:
    """FP8 codes of the new weights, each weight read once for its two."""
    read = codes / 2 * shapes.itemsize
    return (read + codes) / (machine.gpu.bandwidth * machine.assumed.memory)


def _pcie(machine: Machine) -> float:
    return machine.gpu.pcie * machine.assumed.links


# -- between --------------------------------------------------------------------------------


def sync_s(layout: Layout, sync: SyncPlan, machine: Machine) -> float:
    """Every rank receives every weight whole, axis after axis, and copies its own part.

    Tensor- and expert-parallel ranks are neighbours, pipeline ranks are as far apart as can be.
    """
    gpu, reached = machine.gpu, machine.assumed.links
    spans = {"tp": layout.tp, "ep": layout.ep, "pp": layout.world}
    seconds = 2 * sync.total_bytes / gpu.bandwidth
    for axis, moved in sync.moved_bytes.items():
        link = gpu.nvlink if spans[axis] <= GPUS_PER_NODE else gpu.nic
        seconds += moved / (link * reached)
    return seconds


def _offload_s(config: TrainConfig, own: list[dict], machine: Machine) -> float:
    """Gradients and optimizer to the host before the rollout and back after it."""
    if not config.train.offload_in_rollout:
        return 0.0
    moved = max(s["gradients"] + s["optimizer"] * (not config.optim.offload) for s in own)
    return 2 * moved / _pcie(machine)
