"""Weights by Hugging Face names out of a Megatron model, for any TP, EP and PP."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from r1kern.model.gpt import DeepSeekV3
from r1kern.model.layout import stage_of
from r1kern.model.names import hf_shapes, local_tensors, shared_name


@torch.no_grad()
def export_weights(
    model: DeepSeekV3, hf: PretrainedConfig, names: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors by Hugging Face name, layer by layer, on every rank.

    Collective: all ranks iterate to the end together.  One layer's experts are gathered at a time;
    without parallelism the tensors are views of the parameters.

    Args:
        model: the local stage.
        hf: its configuration.
        names: of the tensors, among those of `hf_shapes(hf, mtp=True)`; without
            multi-token prediction by default.

    Yields:
        (name, tensor) in the order of `hf_shapes`.
    """
    shapes = hf_shapes(hf, mtp=True)
    mine: dict[str, tuple[torch.Tensor, int | None]] = {}
    for _, tensor, slot in local_tensors(model):
        for part, name in zip(tensor.chunk(len(slot.names)), slot.names, strict=True):
            mine[name] = (part, slot.split)
    for asked in hf_shapes(hf) if names is None else names:
        name = shared_name(asked)
        owner_stage, owner_ep = _owner(name, hf, model.config)
        tensor = None
        if owner_stage == mpu.get_pipeline_model_parallel_rank():
            if owner_ep is None:
                part, split = mine[name]
                tensor = _gather(part, split)
            else:
                tensor = _from_rank(
                    mine[name][0] if name in mine else None,
                    owner_ep,
                    mpu.get_expert_model_parallel_group(),
                    shapes[name],
                    model.config.params_dtype,
                )
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else None
        tensor = _from_rank(
            tensor,
            owner_stage,
            mpu.get_pipeline_model_parallel_group(),
            shapes[name],
            dtype or model.config.params_dtype,
        )
        yield asked, tensor


def _owner(name: str, hf: PretrainedConfig, config: TransformerConfig) -> tuple[int, int | None]:
    """Pipeline stage and, for an expert, expert-parallel rank that hold a tensor."""
    pp = mpu.get_pipeline_model_parallel_world_size()
    if not name.startswith("model.layers."):
        return (0 if name == "model.embed_tokens.weight" else pp - 1), None
    fields = name.split(".")
    stage = stage_of(int(fields[2]), config)
    if ".mlp.experts." not in name:
        return stage, None
    per_rank = hf.n_routed_experts // mpu.get_expert_model_parallel_world_size()
    return stage, int(fields[5]) // per_rank


def _gather(part: torch.Tensor, split: int | None) -> torch.Tensor:
    """The whole tensor from the tensor-parallel ranks' cuts."""
    size = mpu.get_tensor_model_parallel_world_size()
    if split is None or size == 1:
        return part
    cuts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(cuts, part.contiguous(), group=mpu.get_tensor_model_parallel_group())
    return torch.cat(cuts, dim=split)


def _from_rank(tensor, group_rank: int, group, shape, dtype) -> torch.Tensor:
    """`tensor` as held by one rank of `group`, on all of them."""
    if group.size() == 1:
        return tensor
    if group.rank() != group_rank:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, group_src=group_rank, group=group)
    return tensor
