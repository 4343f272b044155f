"""Whole weights by Hugging Face name on every rank, from a Megatron model in any TP, EP, PP layout.

The moves are those of `sync_plan`.  Trainer and generator share a process, so that on CUDA the
buffers that arrive are device memory which vLLM copies from directly: neither CUDA IPC nor a
transfer of handles is involved.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from r1kern.model.gpt import DeepSeekV3
from r1kern.model.local import local_tensors
from r1kern.model.sync_plan import Bucket, Item, SyncPlan

Named = list[tuple[str, torch.Tensor]]


def export_weights(model: DeepSeekV3, plan: SyncPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `export_buckets` one by one; a tensor that is kept keeps its bucket alive.

    Yields:
        (name, tensor) in the order of the plan, which is that of `hf_shapes`.
    """
    for bucket in export_buckets(model, plan):
        yield from bucket


def export_buckets(model: DeepSeekV3, plan: SyncPlan) -> Iterator[Named]:
    """Whole tensors by Hugging Face name, bucket by bucket, on every rank.

    Collective: all ranks iterate to the end together.  A bucket's buffer is freed with the last of
    its tensors, so a caller that lets go of one bucket before it asks for the next holds
    `plan.peak_bytes` at most.  Tensors that every rank holds anyway are views of the parameters.

    Yields:
        Lists of (name, tensor): views that must not be written to.
    """
    parts = local_parts(model)
    _check_names(parts, plan)
    for bucket in plan.buckets:
        # torch.no_grad around a generator would keep the last bucket while the next is gathered
        yield _gather(bucket, parts)


def local_parts(model: DeepSeekV3) -> dict[str, torch.Tensor]:
    """This rank's tensor, or its tensor-parallel cut, of every name it holds."""
    return {
        name: part
        for _, tensor, slot in local_tensors(model)
        for part, name in zip(tensor.chunk(len(slot.names)), slot.names, strict=True)
    }


def _check_names(parts: dict[str, torch.Tensor], plan: SyncPlan) -> None:
    """This rank holds what the plan says it holds (and may hold copies, as of a tied embedding)."""
    stage = mpu.get_pipeline_model_parallel_rank()
    rank = mpu.get_expert_model_parallel_rank()
    planned = {
        item.source
        for bucket in plan.buckets
        for item in bucket.items
        if bucket.stage == stage and item.expert_rank in (None, rank)
    }
    missing = sorted(planned - parts.keys())
    assert not missing, f"planned, but not held on stage {stage}, expert rank {rank}: {missing[:4]}"


@torch.no_grad()
def _gather(bucket: Bucket, parts: dict[str, torch.Tensor]) -> Named:
    device = next(iter(parts.values())).device
    stages = mpu.get_pipeline_model_parallel_group()
    owner = stages.rank() == bucket.stage
    rank = mpu.get_expert_model_parallel_rank()
    buffer = torch.empty(bucket.size, dtype=torch.uint8, device=device)
    cuts = torch.empty(bucket.cuts, dtype=torch.uint8, device=device)
    experts = {r: buffer[start:end] for r, start, end in bucket.experts}
    if owner:
        _fill(bucket, parts, buffer, cuts, rank)
    if stages.size() > 1:
        for part in (buffer[: bucket.whole], cuts, experts.get(rank)):
            if part is not None and part.numel():
                dist.broadcast(part, group_src=bucket.stage, group=stages)
    if bucket.cuts:
        _gather_cuts(bucket, buffer, cuts)
    for source, part in experts.items():
        dist.broadcast(part, group_src=source, group=mpu.get_expert_model_parallel_group())
    return [
        (item.name, parts[item.source] if item.offset is None else _view(buffer, item))
        for item in bucket.items
    ]


def _fill(bucket: Bucket, parts, buffer: torch.Tensor, cuts: torch.Tensor, rank: int) -> None:
    """Puts what this rank of the owning stage holds where it is sent from."""
    tp = mpu.get_tensor_model_parallel_world_size()
    for item in bucket.items:
        if item.cut_offset is not None:
            _cut_view(cuts, item, tp).copy_(parts[item.source])
        elif item.offset is not None and item.expert_rank in (None, rank):
            _view(buffer, item).copy_(parts[item.source])


def _gather_cuts(bucket: Bucket, buffer: torch.Tensor, cuts: torch.Tensor) -> None:
    """All tensor-parallel ranks' cuts, put together in `buffer`."""
    tp = mpu.get_tensor_model_parallel_world_size()
    gathered = cuts.new_empty(tp * bucket.cuts)
    dist.all_gather_into_tensor(gathered, cuts, group=mpu.get_tensor_model_parallel_group())
    for item in bucket.items:
        if item.cut_offset is not None:
            for whole, ranks in zip(
                _view(buffer, item).chunk(tp, item.split), gathered.chunk(tp), strict=True
            ):
                whole.copy_(_cut_view(ranks, item, tp))


def _view(buffer: torch.Tensor, item: Item) -> torch.Tensor:
    return buffer[item.offset : item.offset + item.nbytes].view(item.dtype).view(item.shape)


def _cut_view(cuts: torch.Tensor, item: Item, tp: int) -> torch.Tensor:
    shape = list(item.shape)
    shape[item.split] //= tp
    start = item.cut_offset
    return cuts[start : start + item.nbytes // tp].view(item.dtype).view(shape)
