"""Micro-batches through Megatron's pipeline schedule."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

from r1kern.distributed import World
from r1kern.model.core_attention import Packing
from r1kern.types import PackedBatch


def run_batches(
    model: torch.nn.Module, batches: list[PackedBatch], step, **schedule
) -> list[torch.Tensor]:
    """The schedule over the micro-batches; collective in the pipeline.

    Args:
        model: the local stage, wrapped for its gradients or not.
        step: takes a batch and what the last stage gives for it; see Megatron's `forward_step`.
        schedule: further arguments of the schedule.
    """

    def forward_step(iterator, model):
        batch = next(iterator)
        packing = Packing.of(batch.cu_seqlens, sequences=len(batch.mask))
        output = model(batch.tokens[None], batch.positions[None], None, packed_seq_params=packing)
        return output, partial(step, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=max(b.tokens.numel() for b in batches),
        micro_batch_size=1,
        **schedule,
    )


@torch.no_grad()
def score_batches(
    model: torch.nn.Module, batches: list[PackedBatch], score, world: World
) -> list[torch.Tensor]:
    """One float32 [B, S] grid per micro-batch, 0 under the mask, on every pipeline stage.

    Args:
        score: takes a batch and what the last stage gives for it; gives [N].
    """

    def step(batch, output, non_loss_data):
        return batch.grid(score(batch, output))

    grids = run_batches(model, batches, step, forward_only=True, collect_non_loss_data=True)
    return [grid.to(world.device) for grid in from_last_stage(grids, world)]


def from_last_stage(value, world: World):
    """What the last pipeline stage holds, on every stage."""
    if world.pp == 1:
        return value
    sent = [value]
    dist.broadcast_object_list(
        sent, group_src=world.pp - 1, group=mpu.get_pipeline_model_parallel_group()
    )
    return sent[0]
