"""A Hugging Face checkpoint into this rank's parameters, for any TP, EP and PP."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu

from r1kern.hf.reader import Cut, HFReader
from r1kern.hf.scalar_head import SCORE
from r1kern.model.gpt import DeepSeekV3
from r1kern.model.local import local_tensors


@torch.no_grad()
def import_weights(model: DeepSeekV3, reader: HFReader) -> None:
    """Fill this rank's parameters and buffers, reading only its slices.

    A scalar head stays as it is where the checkpoint is a language model's, whose own is left out.
    Beyond the parameters it holds no more than the pages of two shards (see `HFReader.load`).

    Args:
        model: the local stage.
        reader: the checkpoint.
    """
    rank = mpu.get_tensor_model_parallel_rank()
    cuts = []
    for _, tensor, slot in local_tensors(model):
        if slot.names == (SCORE,) and SCORE not in reader.stored:
            continue
        for part, name in zip(tensor.chunk(len(slot.names)), slot.names, strict=True):
            start = [0] * part.dim()
            if slot.split is not None:
                start[slot.split] = rank * part.shape[slot.split]
            window = [slice(a, a + n) for a, n in zip(start, part.shape, strict=True)]
            cuts.append(Cut(name, part, tuple(window)))
    reader.load(cuts)
