"""A config to its plan: parameters, bytes, traffic, FLOPs, modelled seconds, what does not fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from r1kern.config import TrainConfig
from r1kern.errors import UserError
from r1kern.plan import dry, memory, steptime
from r1kern.plan.dry import Cost, Layout, Stage
from r1kern.plan.hardware import GPU, HARDWARE, Assumptions
from r1kern.plan.memory import Shapes
from r1kern.plan.steptime import Lengths, Machine
from r1kern.plan.trace import Work


@dataclass(frozen=True)
class Plan:
    """All that `r1kern plan` says of a config.

    Attributes:
        config, layout, gpu, assumed, lengths: what was planned.
        stages: exact parameters, from the real model.
        costs: measured on fake tensors: "embedding", "dense", "moe", "final"; "head" by formula.
        shapes: of the model.
        microbatches: of one update, on each data-parallel rank.
        phases: of each stage, bytes of a rank: phase -> component -> bytes.
        host: of each stage, bytes of a node: component -> bytes.
        seconds: *modelled*, by phase of the step.
    """

    config: TrainConfig
    layout: Layout
    gpu: GPU
    assumed: Assumptions
    lengths: Lengths
    stages: list[Stage]
    costs: dict[str, Cost]
    shapes: Shapes
    microbatches: int
    phases: list[dict[str, dict[str, float]]]
    host: list[dict[str, float]]
    seconds: dict[str, float]

    @property
    def parameters(self) -> int:
        return sum(stage.distinct for stage in self.stages)

    @property
    def fullest(self) -> int:
        """The stage whose ranks need most memory."""
        peaks = [memory.peak(phases) for phases in self.phases]
        return peaks.index(max(peaks))

    @property
    def peak(self) -> float:
        return memory.peak(self.phases[self.fullest])

    @property
    def host_peak(self) -> float:
        return max(sum(parts.values()) for parts in self.host)

    @property
    def fits(self) -> bool:
        return self.peak <= self.gpu.memory and self.host_peak <= self.gpu.host_memory

    def step_work(self) -> Work:
        """One micro-batch, forward and backward, of the stage that does most."""
        pieces = [self.pieces(stage) for stage in range(self.layout.pp)]
        works = [sum((p.forward + p.backward for p in ps), Work()) for ps in pieces]
        return max(works, key=lambda work: work.all_flops)

    def pieces(self, stage: int) -> list[Cost]:
        return memory.stage_costs(stage, self.layout, self.shapes.dense_layers, self.costs)


def make_plan(
    config: TrainConfig,
    *,
    world: int | None = None,
    hardware: str = "h100",
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
    device: str = "cuda",
) -> Plan:
    """Plan a GRPO run; builds the real model on fake tensors, needs no GPU.

    Args:
        world: processes; None: `parallel.world_size`, or the fewest that the layout takes.
        hardware: a key of `hardware.HARDWARE`.
        prompt_tokens, response_tokens: means of the data; None: a quarter of the longest prompt
            and half of the completion budget.
        device: "cuda", or "cpu" for the memory of a run on the CPU.

    Raises:
        UserError: a layout that cannot work, unknown hardware, or a model that cannot be read.
    """
    from r1kern.hf.config import read_hf_config

    if hardware not in HARDWARE:
        raise UserError(f"--hardware {hardware} is unknown: use one of {', '.join(HARDWARE)}")
    machine = Machine(HARDWARE[hardware], Assumptions())
    hf = read_hf_config(config.model.path)
    layout = _layout(config, hf, world)
    longest = config.rollout.max_tokens
    lengths = Lengths(
        prompt_tokens or config.data.max_prompt_tokens / 4, response_tokens or longest / 2, longest
    )
    dtype = _dtype(config)
    stages = dry.stage_parameters(hf, layout, dtype)
    shapes = model_shapes(hf, layout, stages, dtype.itemsize, config.parallel.generator_tp)
    costs = measured_costs(config, hf, layout, shapes, lengths)
    return assemble(config, layout, machine, lengths, stages, costs, shapes, device=device)


def assemble(
    config: TrainConfig,
    layout: Layout,
    machine: Machine,
    lengths: Lengths,
    stages: list[Stage],
    costs: dict[str, Cost],
    shapes: Shapes,
    *,
    device: str = "cuda",
) -> Plan:
    """The arithmetic of a plan, once its pieces are measured."""
    dense = shapes.dense_layers
    pieces = [memory.stage_costs(s, layout, dense, costs) for s in range(layout.pp)]
    count = memory.microbatches(config, layout, lengths.total)
    phases = [
        memory.by_phase(
            config, layout, i, stage, pieces[i], shapes, machine.assumed,
            microbatches=count, device=device,
        )
        for i, stage in enumerate(stages)
    ]  # fmt: skip
    host = [memory.host_node(config, layout, stage, shapes, machine.assumed) for stage in stages]
    seconds = steptime.step_seconds(config, layout, stages, pieces, shapes, lengths, machine)
    return Plan(
        config, layout, machine.gpu, machine.assumed, lengths, stages, costs, shapes, count,
        phases, host, seconds,
    )  # fmt: skip


def measured_costs(config, hf, layout: Layout, shapes: Shapes, lengths: Lengths):
    """`dry.measure` for the config's micro-batches, and the fused head's products."""
    rows = config.train.tokens_per_microbatch
    rows -= rows % layout.tp
    costs = dry.measure(
        hf,
        tp=layout.tp,
        ep=layout.ep,
        rows=rows,
        length=max(1, min(rows, math.ceil(lengths.total))),
        dtype=_dtype(config),
        recompute=config.train.recompute,
    )
    return costs | {"head": head_cost(shapes, layout.tp, rows)}


def head_cost(shapes: Shapes, tp: int, rows: int) -> Cost:
    """Products of the language-model head with its loss; its memory is a component of its own."""
    products = 2 * rows * shapes.hidden * shapes.vocab / tp
    weight = shapes.hidden * shapes.vocab // tp
    return Cost(weight, 0, 0, 0, 0, Work(flops=products), Work(flops=2 * products))


def model_shapes(hf, layout: Layout, stages: list[Stage], itemsize: int, width: int) -> Shapes:
    """Sizes from the configuration, parameters from the stages that were built."""
    total = sum(stage.distinct for stage in stages)
    expert = sum(stage.expert for stage in stages) * layout.ep
    experts = getattr(hf, "n_routed_experts", 0) or 0
    topk = hf.num_experts_per_tok if experts else 0
    unused = expert * (1 - topk / experts) if experts else 0
    return Shapes(
        hidden=hf.hidden_size,
        vocab=hf.vocab_size,
        layers=hf.num_hidden_layers,
        dense_layers=hf.first_k_dense_replace if experts else hf.num_hidden_layers,
        experts=experts,
        topk=topk,
        parameters=total,
        expert_parameters=expert,
        active=int(total - unused - hf.vocab_size * hf.hidden_size),
        kv_bytes=_kv_elements(hf, width) * itemsize,
        itemsize=itemsize,
        largest_tensor=hf.vocab_size * hf.hidden_size * itemsize,
    )


def _kv_elements(hf, width: int) -> int:
    """Of one token on one rank of the generator; the latent is held whole by each of them."""
    if getattr(hf, "kv_lora_rank", None):
        return hf.num_hidden_layers * (hf.kv_lora_rank + hf.qk_rope_head_dim)
    head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return hf.num_hidden_layers * 2 * head * max(1, hf.num_key_value_heads // width)


def _layout(config: TrainConfig, hf, world: int | None) -> Layout:
    """The config's layout in a world of the given size.

    Raises:
        UserError: it cannot work.
    """
    p = config.parallel
    world = world or p.world_size or math.lcm(p.tp * p.pp, p.ep * p.pp, p.generator_tp)
    lines = [
        f"{axes}={size} does not divide the world size {world}"
        for axes, size in (
            ("tp*pp", p.tp * p.pp),
            ("ep*pp", p.ep * p.pp),
            ("generator_tp", p.generator_tp),
        )
        if world % size
    ]
    layers = stage_layers(hf.num_hidden_layers, p.pp, p.layers)
    if len(layers) != p.pp or sum(layers) != hf.num_hidden_layers:
        lines.append(f"parallel.layers must be {p.pp} numbers that sum to {hf.num_hidden_layers}")
    if lines:
        raise UserError("impossible layout: " + "; ".join(lines) + ": change parallel or --world")
    return Layout(world, p.tp, p.ep, p.pp, layers)


def stage_layers(num_layers: int, pp: int, layers: list[int] = ()) -> tuple[int, ...]:
    """Layers of each pipeline stage: as given, or even with the first and last lighter."""
    if layers or pp == 1:
        return tuple(layers) or (num_layers,)
    if num_layers % pp == 0:
        return (num_layers // pp,) * pp
    share, rest = divmod(num_layers + 2, pp)
    counts = [share + (stage < rest) for stage in range(pp)]
    counts[0] -= 1
    counts[-1] -= 1
    return tuple(counts)


def _dtype(config: TrainConfig):
    import torch

    return getattr(torch, config.model.dtype)


def as_json(plan: Plan) -> dict:
    """The plan as plain data; modelled figures stand under a key that says so."""
    work = plan.step_work()
    return {
        "layout": asdict(plan.layout),
        "hardware": asdict(plan.gpu),
        "parameters": plan.parameters,
        "stages": [asdict(stage) for stage in plan.stages],
        "microbatches": plan.microbatches,
        "lengths": asdict(plan.lengths),
        "bytes_per_gpu": plan.phases,
        "bytes_per_host_node": plan.host,
        "peak_bytes": plan.peak,
        "fits": plan.fits,
        "flops_per_microbatch_and_stage": {
            "products": work.flops,
            "attention": work.attention_flops,
        },
        "collectives_per_microbatch_and_stage": [
            {"name": name, "ranks": ranks, "calls": work.calls[name, ranks], "bytes": sent}
            for (name, ranks), sent in sorted(work.traffic.items())
        ],
        "modelled_seconds": plan.seconds,
        "modelled_step_seconds": sum(plan.seconds.values()),
        "assumptions": asdict(plan.assumed),
    }
