"""Weights by Hugging Face names, into a Megatron model for any TP, EP and PP."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu

from r1kern.model.gpt import DeepSeekV3
from r1kern.model.names import local_tensors


@torch.no_grad()
def import_weights(model: DeepSeekV3, read) -> None:
    """Fill this rank's parameters and buffers.

    Args:
        model: the local stage.
        read: `read(name, split, rank, size) -> Tensor`, the `rank`-th of `size` equal cuts of a
            Hugging Face tensor along `split`, or the whole of it when `split` is None.
    """
    rank = mpu.get_tensor_model_parallel_rank()
    size = mpu.get_tensor_model_parallel_world_size()
    for _, tensor, slot in local_tensors(model):
        for part, name in zip(tensor.chunk(len(slot.names)), slot.names, strict=True):
            part.copy_(read(name, slot.split, rank, size))
