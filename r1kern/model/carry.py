"""Every tensor of a model folder: what is trained, and multi-token prediction carried along."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import chain

import torch
from transformers import PretrainedConfig

from r1kern.hf.names import hf_shapes, shared_name
from r1kern.hf.reader import Cut, HFReader


def export_whole(
    export: Callable[[Collection[str]], Iterator[tuple[str, torch.Tensor]]],
    hf: PretrainedConfig,
    source: HFReader | None,
    *,
    mtp_is_trained: bool,
    dtype: torch.dtype,
    is_writer: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors, those of the multi-token-prediction layers included; collective.

    Where they are not trained they are no part of the model and take no memory: the writer reads
    them, as far as they are there, from the folder that the model came from.  Their copies of
    embedding and head are the model's in either case.

    Args:
        export: yields the named tensors out of the model.
        source: that folder; None when the model began at random.
        dtype: of the model's parameters.
        is_writer: this rank yields the tensors that only `source` has.
    """
    trained, names = hf_shapes(hf), hf_shapes(hf, mtp=True)
    if mtp_is_trained:
        return export(names)
    deeper = [name for name in names if name not in trained and source and name in source.stored]
    copies = [name for name in deeper if shared_name(name) != name]
    read = (
        (name, _read(source, name, dtype)) for name in deeper if is_writer and name not in copies
    )
    return chain(export([*trained, *copies]), read)


def _read(source: HFReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    shape = source.stored[name].shape
    tensor = torch.empty(
        shape, dtype=torch.float32 if name.endswith("e_score_correction_bias") else dtype
    )
    source.load([Cut(name, tensor, tuple(slice(0, size) for size in shape))])
    return tensor
