"""The real model code without a cluster: a fake process group and fake tensors.

One process plays one rank of any world; Megatron's groups, `build_model` and every layer are the
ones that train.  Only the counts of rows per expert, which the host must know, are given: routing
is taken as balanced.
"""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from r1kern.config import RecomputedPart
from r1kern.errors import UserError
from r1kern.model import fp8
from r1kern.model.recompute import recompute_fields
from r1kern.plan.balanced import balanced
from r1kern.plan.random_state import without_random_states
from r1kern.plan.trace import SavedBytes, Trace, Work


@dataclass(frozen=True)
class Layout:
    """Sizes that a plan varies.

    Attributes:
        world: processes.
        tp, ep, pp: parallel sizes.
        layers: of each pipeline stage.
    """

    world: int
    tp: int
    ep: int
    pp: int
    layers: tuple[int, ...]

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        return self.world // (self.ep * self.pp)

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp} EP{self.ep} DP{self.dp}"


@dataclass(frozen=True)
class Stage:
    """Parameters held by each rank of a pipeline stage.

    Attributes:
        layers: transformer layers.
        dense: parameters reduced over all data-parallel ranks.
        expert: parameters of routed experts.
        distinct: parameters of the stage, each counted once over its ranks.
    """

    layers: int
    dense: int
    expert: int
    distinct: int


@dataclass(frozen=True)
class Cost:
    """One piece of the model (a layer, the embedding, the head) on one rank and micro-batch.

    Attributes:
        dense, expert: parameters, as in `Stage`.
        saved: bytes kept for the backward.
        working: further bytes at the peak of forward and backward.
        forward_peak: bytes at the peak of a forward without gradient.
        forward, backward: work of each pass, recomputation in the backward.
        codes: bytes of the weights' FP8 codes, kept between updates; in no figure above.
    """

    dense: int
    expert: int
    saved: int
    working: int
    forward_peak: int
    forward: Work
    backward: Work
    codes: float = 0

    def recomputed(self, input_bytes: int) -> Cost:
        """The same piece when only its input is kept and the forward runs again."""
        return replace(
            self,
            saved=input_bytes,
            working=self.saved + self.working,
            backward=self.backward + self.forward,
        )

    def in_updates_only(self) -> Cost:
        """The same piece when passes without gradient leave it out."""
        return replace(self, forward_peak=0, forward=Work(), backward=self.forward + self.backward)


@contextmanager
def fake_world(layout: Layout, rank: int):
    """Within the block this process is `rank` of the world, with Megatron's groups.

    Raises:
        UserError: torch.distributed is in use already.
    """
    if dist.is_initialized():
        raise UserError("a plan needs a process of its own: do not start it with torchrun")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from r1kern import megatron_cpu

    if not torch.cuda.is_available():
        megatron_cpu.install()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    excepthook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        with without_random_states(), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = excepthook  # torch.distributed wraps it once for every world


def build_stage(
    hf: PretrainedConfig,
    layout: Layout,
    dtype: torch.dtype,
    *,
    precision: fp8.Precision | None = None,
    **overrides,
):
    """This rank's pipeline stage, with what the configuration has of multi-token prediction.

    Call it within `fake_world`.
    """
    from r1kern.model.gpt import build_model
    from r1kern.model.megatron_config import to_megatron_config

    config = to_megatron_config(
        hf,
        tp=layout.tp,
        ep=layout.ep,
        pp=layout.pp,
        dtype=dtype,
        layers=list(layout.layers),
        mtp=True,
        perform_initialization=False,
        **overrides,
    )
    positions = hf.max_position_embeddings
    return build_model(config, vocab_size=hf.vocab_size, max_positions=positions, fp8=precision)


def stage_parameters(hf: PretrainedConfig, layout: Layout, dtype: torch.dtype) -> list[Stage]:
    """Exact parameters of each pipeline stage, from the real model of one rank of it.

    Stages with the same layers are built once.
    """
    built: dict[tuple, Stage] = {}
    stages, kinds = [], layer_kinds(hf)
    for index, count in enumerate(layout.layers):
        first = sum(layout.layers[:index])
        key = (index == 0, index == layout.pp - 1, *kinds[first : first + count])
        if key not in built:
            built[key] = _stage(hf, layout, dtype, index)
        stages.append(built[key])
    return stages


def layer_kinds(hf) -> list[str]:
    """ "dense" or "moe" for each layer."""
    dense = getattr(hf, "first_k_dense_replace", hf.num_hidden_layers)
    return ["dense" if i < dense else "moe" for i in range(hf.num_hidden_layers)]


def _stage(hf, layout: Layout, dtype, stage: int) -> Stage:
    with fake_world(layout, stage * layout.world // layout.pp):
        from r1kern.model.local import local_tensors

        model = build_stage(hf, layout, dtype)
        trained = dict(model.named_parameters())
        split = {name: slot.split for name, _, slot in local_tensors(model)}
        expert = {name for name, p in trained.items() if not getattr(p, "allreduce", True)}
        copies = {
            name: layout.ep if name in expert else 1 if split[name] is None else layout.tp
            for name, p in trained.items()
            if not getattr(p, "shared", False)  # else a copy of the first stage's embedding
        }
        return Stage(
            layers=len(model.decoder.layers),
            dense=sum(p.numel() for name, p in trained.items() if name not in expert),
            expert=sum(trained[name].numel() for name in expert),
            distinct=sum(trained[name].numel() * ranks for name, ranks in copies.items()),
        )


def measure(
    hf: PretrainedConfig,
    *,
    tp: int,
    ep: int,
    rows: int,
    length: int,
    dtype: torch.dtype,
    recompute: list[RecomputedPart] = (),
    precision: fp8.Precision | None = None,
) -> dict[str, Cost]:
    """Costs of one layer of each kind, of the embedding and of the final norm.

    Args:
        tp, ep: layout of the layers.
        rows: packed rows of a micro-batch.
        length: rows of each sequence in it.
        recompute: see `config.Train`.
        precision: what is computed in FP8.

    Returns:
        "embedding", "dense" and "moe" layer (those the model has), "final": the norm and the gather
        before the head, without the head itself, and "mtp": all multi-token-prediction layers,
        which run in updates only, so that their forward is counted with the backward.
    """
    kinds = sorted(set(layer_kinds(hf)))
    small = copy.deepcopy(hf)
    small.num_hidden_layers = len(kinds)
    if "moe" in kinds:
        small.first_k_dense_replace = int("dense" in kinds)
    layout = Layout(tp * ep, tp, ep, 1, (len(kinds),))
    packing, tokens, positions = _micro_batch(rows, length)
    with fake_world(layout, 0):
        model = build_stage(small, layout, dtype, precision=precision, **_selective(recompute))
        for module in list(model.modules()):
            if hasattr(module, "token_dispatcher"):
                module.token_dispatcher = balanced(module.token_dispatcher)
        for parameter in model.parameters():  # Megatron's buffers, counted as "gradients"
            parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)
        pieces = {"embedding": model.embedding, "final": model.decoder.final_layernorm}
        pieces |= dict(zip(kinds, model.decoder.layers, strict=True))
        calls = _calls(pieces, lambda: model(tokens, positions, None, packed_seq_params=packing))
        norm = calls["final"]
        calls["final"] = lambda: model._whole(norm())
        if model.mtp_process:
            pieces["mtp"] = model.mtp
            calls["mtp"] = _deeper_call(model, norm, tokens, packing)
        costs = {name: _cost(piece, calls[name]) for name, piece in pieces.items()}
        inputs = dict.fromkeys(kinds, 1) | {"mtp": 2 * hf.num_nextn_predict_layers}
        if "full" in recompute:
            kept = rows // tp * hf.hidden_size * dtype.itemsize
            costs |= {k: costs[k].recomputed(kept * n) for k, n in inputs.items() if k in costs}
        if "mtp" in costs:
            costs["mtp"] = costs["mtp"].in_updates_only()
    return costs


def _selective(recompute) -> dict:
    """Megatron's options for parts of a layer; "full" is the whole layer, see `recomputed`.

    Raises:
        UserError: parts that cannot be recomputed.
    """
    fields = recompute_fields(list(recompute))
    return {} if "full" in recompute else fields


def _micro_batch(rows: int, length: int):
    from r1kern.model.core_attention import Packing

    starts = [*range(0, rows, length), rows]
    packing = Packing.of(torch.tensor(starts, dtype=torch.int32))
    assert packing.grids.shapes  # made here, because the host reads the lengths
    return packing, torch.zeros(1, rows, dtype=torch.int64), packing.positions[None]


def _calls(pieces: dict, run) -> dict:
    """Each piece as a function without arguments: the model's call, its hidden states a leaf."""
    calls = {}

    def noting(name, piece):
        def note(_, args, kwargs):
            calls[name] = _call(piece, args, kwargs)

        return piece.register_forward_pre_hook(note, with_kwargs=True)

    hooks = [noting(name, piece) for name, piece in pieces.items()]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return calls


def _deeper_call(model, norm, tokens, packing):
    """The multi-token-prediction layers on states as `norm` returns them."""
    with torch.no_grad():
        leaf = norm()
    leaf = leaf.detach().requires_grad_()

    def again():
        leaf.grad = None
        states = model._predict_deeper(leaf, tokens, packing)
        return torch.cat([model._whole(state) for state in states])

    return again


def _call(piece, args, kwargs):
    """`piece(*args, **kwargs)` again, its hidden states (if any) a leaf that wants a gradient."""
    kwargs = dict(kwargs)
    leaf = None
    if "hidden_states" in kwargs:
        leaf = kwargs["hidden_states"] = kwargs["hidden_states"].detach().requires_grad_()
    elif args and args[0].is_floating_point():
        leaf = args[0].detach().requires_grad_()
        args = (leaf, *args[1:])

    def again():
        if leaf is not None:
            leaf.grad = None
        out = piece(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return again


def _cost(module, forward) -> Cost:
    """Forward without gradient, then with it and the backward.

    FP8 codes are there before, from the model's call (`_calls`) or the forward without gradient.
    """
    with torch.no_grad(), Trace() as bare:
        forward()
    saved = SavedBytes(module)
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in module.parameters()]
    with Trace() as trace:
        with saved.watch():
            out = forward()
        kept, work = saved.total(), trace.work
        trace.work = Work()
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    for hook in hooks:
        hook.remove()
    experts = sum(p.numel() for p in module.parameters() if not getattr(p, "allreduce", True))
    return Cost(
        dense=sum(p.numel() for p in module.parameters()) - experts,
        expert=experts,
        saved=kept,
        working=max(0, trace.peak - kept),
        forward_peak=bare.peak,
        forward=work,
        backward=trace.work,
        codes=fp8.codes_bytes(module),
    )


def _drop(parameter) -> None:
    """A gradient is added to the gradient buffer and freed as soon as it is there."""
    parameter.grad = None
