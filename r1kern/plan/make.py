"""A config to its plan: parameters, bytes, traffic, FLOPs, modelled seconds, what does not fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from transformers import PretrainedConfig

from r1kern.config import TrainConfig
from r1kern.errors import UserError
from r1kern.hf.config import check_layout, check_mtp, read_hf_config
from r1kern.hf.dense import is_dense, refuse_moe_options
from r1kern.hf.flops import ModelFlops, attention_head_dim
from r1kern.hf.fp8_fit import refuse_fp8
from r1kern.hf.layout import stage_layers
from r1kern.hf.names import hf_shapes, hf_splits
from r1kern.model.fp8 import Precision
from r1kern.model.sync_plan import SyncPlan, plan_sync
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
        costs: measured on fake tensors: "embedding", "dense", "moe", "final", "mtp"; "head" by
            formula.
        sync: how the weights travel to the generator.
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
    sync: SyncPlan
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
        return memory.stage_costs(stage, self.layout, self.shapes, self.costs)


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
        UserError: a layout that cannot work, unknown hardware, lengths that cannot be, or a model
            that cannot be read.
    """
    if hardware not in HARDWARE:
        raise UserError(f"--hardware {hardware} is unknown: use one of {', '.join(HARDWARE)}")
    sizes = {"world": world, "prompt": prompt_tokens, "response": response_tokens}
    if bad := [f"--{name} {n:g}" for name, n in sizes.items() if n is not None and n <= 0]:
        raise UserError(f"{', '.join(bad)} must be more than 0")
    if (response_tokens or 0) > config.rollout.max_tokens:
        raise UserError(
            f"--response {response_tokens:g} exceeds rollout.max_tokens = "
            f"{config.rollout.max_tokens}: lower it or raise the budget"
        )
    machine = Machine(HARDWARE[hardware], Assumptions())
    hf = model_as_built(config, device)
    layout = _layout(config, hf, world)
    longest = config.rollout.max_tokens
    lengths = Lengths(
        prompt_tokens or config.data.max_prompt_tokens / 4, response_tokens or longest / 2, longest
    )
    dtype = _dtype(config)
    stages = dry.stage_parameters(hf, layout, dtype)
    shapes = model_shapes(hf, dtype.itemsize, config.parallel.generator_tp)
    costs = measured_costs(config, hf, layout, shapes, lengths)
    sync = plan_of_sync(config, hf, layout)
    return assemble(config, layout, machine, lengths, stages, costs, shapes, sync, device=device)


def model_as_built(config: TrainConfig, device: str = "cuda") -> PretrainedConfig:
    """The model's configuration, without multi-token prediction where it is not trained.

    Raises:
        UserError: it cannot be read, or lacks what the options train.
    """
    hf = read_hf_config(config.model.path)
    refuse_moe_options(hf, config.model, config.experts)
    check_mtp(hf, config.model)
    refuse_fp8(hf, config.model, config.parallel, recompute=config.train.recompute, device=device)
    if not config.model.mtp_coef:
        hf.num_nextn_predict_layers = 0
    return hf


def plan_of_sync(config: TrainConfig, hf, layout: Layout) -> SyncPlan:
    """As `train.policy.Policy.sync_plan`: the generator's weights to every rank."""
    shapes = hf_shapes(hf)
    return plan_sync(
        shapes,
        hf_splits(shapes),
        dtype=_dtype(config),
        tp=layout.tp,
        ep=layout.ep,
        layers=layout.layers,
        experts=0 if is_dense(hf) else hf.n_routed_experts,
        bucket_bytes=config.generator.sync_bucket_mib << 20,
    )


def assemble(
    config: TrainConfig,
    layout: Layout,
    machine: Machine,
    lengths: Lengths,
    stages: list[Stage],
    costs: dict[str, Cost],
    shapes: Shapes,
    sync: SyncPlan,
    *,
    device: str = "cuda",
) -> Plan:
    """The arithmetic of a plan, once its pieces are measured."""
    pieces = [memory.stage_costs(s, layout, shapes, costs) for s in range(layout.pp)]
    count = memory.microbatches(config, layout, lengths.total)
    phases = [
        memory.by_phase(
            config, layout, i, stage, pieces[i], shapes, machine.assumed,
            sync=sync, microbatches=count, device=device,
        )
        for i, stage in enumerate(stages)
    ]  # fmt: skip
    host = [memory.host_node(config, layout, stage, shapes, machine.assumed) for stage in stages]
    seconds = steptime.step_seconds(config, layout, stages, pieces, shapes, sync, lengths, machine)
    return Plan(
        config, layout, machine.gpu, machine.assumed, lengths, stages, costs, shapes, sync,
        count, phases, host, seconds,
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
        precision=Precision.of(config.model),
    )
    return costs | {"head": head_cost(shapes, layout.tp, rows)}


def head_cost(shapes: Shapes, tp: int, rows: int) -> Cost:
    """Products of the language-model head with its loss; its memory is a component of its own.

    Each depth of multi-token prediction passes its rows through it too, in updates only.
    """
    products = shapes.flops.head * rows / tp
    deeper = 3 * products * shapes.depths
    weight = shapes.hidden * shapes.vocab // tp
    return Cost(weight, 0, 0, 0, 0, Work(flops=products), Work(flops=2 * products + deeper))


def model_shapes(hf, itemsize: int, width: int) -> Shapes:
    """Sizes from the configuration.

    Args:
        itemsize: bytes of a weight.
        width: tensor-parallel ranks of the generator.
    """
    sizes = {name: math.prod(shape) for name, shape in hf_shapes(hf).items()}
    experts = 0 if is_dense(hf) else hf.n_routed_experts
    return Shapes(
        hidden=hf.hidden_size,
        vocab=hf.vocab_size,
        layers=hf.num_hidden_layers,
        dense_layers=hf.first_k_dense_replace if experts else hf.num_hidden_layers,
        experts=experts,
        topk=hf.num_experts_per_tok if experts else 0,
        depths=hf.num_nextn_predict_layers,
        tied=is_dense(hf) and hf.tie_word_embeddings,
        parameters=sum(sizes.values()),
        expert_parameters=sum(n for name, n in sizes.items() if ".mlp.experts." in name),
        flops=ModelFlops.of(hf),
        kv_bytes=_kv_elements(hf, width) * itemsize,
        itemsize=itemsize,
    )


def _kv_elements(hf, width: int) -> int:
    """Of one token on one rank of the generator; the latent is held whole by each of them."""
    if not is_dense(hf):
        return hf.num_hidden_layers * (hf.kv_lora_rank + hf.qk_rope_head_dim)
    heads = max(1, hf.num_key_value_heads // width)
    return hf.num_hidden_layers * 2 * attention_head_dim(hf) * heads


def _layout(config: TrainConfig, hf, world: int | None) -> Layout:
    """The config's layout in a world of the given size.

    Raises:
        UserError: it cannot work.
    """
    p = config.parallel
    world = world or p.world_size or math.lcm(p.tp * p.pp, p.ep * p.pp, p.generator_tp)
    check_layout(hf, p, world)
    layers = tuple(stage_layers(hf.num_hidden_layers, p))
    return Layout(world, p.tp, p.ep, p.pp, layers)


def _dtype(config: TrainConfig) -> torch.dtype:
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
        "sync_bytes_of_a_rank": plan.sync.moved_bytes,
        "flops_per_microbatch_and_stage": {
            "products": work.flops,
            "fp8_products": work.fp8_flops,
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
