"""How the weights of all ranks travel to every rank, planned from names and shapes alone.

A plan is pure: the same arguments give the same plan on every rank and in a process without any
process group (`r1kern plan`).  `export.export_buckets` carries it out:

1. the owning pipeline stage broadcasts its local part of a bucket (one tensor-parallel cut, one
   expert-parallel rank's experts) along the pipeline groups,
2. the cuts are gathered over the tensor-parallel group of every stage,
3. each expert-parallel rank broadcasts its experts.

The pipeline, which crosses machines, thereby carries 1/tp of the dense weights and 1/ep of the
experts.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

import torch

ALIGNMENT = 16  # bytes; every element type may be viewed there


@dataclass(frozen=True)
class Item:
    """One tensor of a bucket.

    Attributes:
        name: published (Hugging Face) name.
        source: name under which the model holds it; another one for a published copy, as of the
            embedding in a multi-token-prediction layer.
        shape, dtype: of the whole tensor.
        split: dimension cut over the tensor-parallel ranks; None when each holds the whole.
        expert_rank: expert-parallel rank that holds it; None when each does.
        offset: bytes into the bucket's buffer; None for a tensor that every rank holds already
            and that is yielded from where it lies.
        cut_offset: bytes into the buffer of local cuts, where `split` is set.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    split: int | None
    expert_rank: int | None
    offset: int | None = None
    cut_offset: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Consecutive tensors of one pipeline stage that are moved together.

    The buffer holds the whole tensors, then the split ones, then each expert rank's experts, so
    that what one broadcast moves is one range.

    Attributes:
        stage: pipeline stage that holds them.
        items: in the order in which they are yielded.
        size: bytes of the buffer.
        whole: [0, whole) is what every rank of the owning stage holds.
        cuts: bytes of one rank's tensor-parallel cuts.
        experts: expert-parallel rank -> range of the buffer.
    """

    stage: int
    items: tuple[Item, ...]
    size: int
    whole: int
    cuts: int
    experts: tuple[tuple[int, int, int], ...]

    def peak_bytes(self, tp: int) -> int:
        """Buffer, this rank's cuts and all ranks' cuts, which are alive together."""
        return self.size + (self.cuts * (1 + tp) if self.cuts else 0)


@dataclass(frozen=True)
class SyncPlan:
    """Buckets in the order of the shapes given, and what moving them costs a rank."""

    buckets: tuple[Bucket, ...]
    tp: int
    ep: int
    pp: int

    @cached_property
    def peak_bytes(self) -> int:
        """Largest sum of the buffers alive at once on any rank; one bucket is in flight.

        What a collective library keeps for itself and what the receiver makes is not in it.
        """
        return max(bucket.peak_bytes(self.tp) for bucket in self.buckets)

    @cached_property
    def total_bytes(self) -> int:
        """Of all tensors, whole."""
        return sum(item.nbytes for bucket in self.buckets for item in bucket.items)

    @cached_property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes one rank sends or receives over each axis's groups, "pp", "tp" and "ep"."""
        experts = sum(end - start for b in self.buckets for _, start, end in b.experts)
        cuts = sum(b.cuts for b in self.buckets)
        local = sum(b.whole for b in self.buckets) + cuts + experts // self.ep
        return {
            "pp": local if self.pp > 1 else 0,
            "tp": cuts * (self.tp - 1),
            "ep": experts * (self.ep - 1) // self.ep,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Equal on two ranks exactly when their plans are."""
        return hashlib.sha256(repr((self.tp, self.ep, self.pp, self.buckets)).encode()).hexdigest()


def plan_sync(
    shapes: Mapping[str, tuple[int, ...]],
    splits: Mapping[str, int | None],
    *,
    dtype: torch.dtype,
    tp: int,
    ep: int,
    layers: Sequence[int],
    experts: int,
    bucket_bytes: int,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> SyncPlan:
    """Cuts the model into buckets.

    Args:
        shapes: name -> shape of the whole tensor, layer by layer (`names.hf_shapes`).
        splits: name -> dimension that tensor parallelism cuts (`names.hf_splits`).
        dtype: of the parameters.
        tp, ep: sizes of the trainer's tensor- and expert-parallel groups.
        layers: layers of each pipeline stage, as many entries as stages.
        experts: routed experts of a layer (0 for a dense model).
        bucket_bytes: most bytes of whole tensors in a bucket; a larger tensor has one of its own.
        copies: name -> name of the tensor that it repeats.
    """
    pp = len(layers)
    items = [
        Item(
            name,
            copies.get(name, name),
            tuple(shape),
            dtype_of(name, dtype),
            splits[name] if tp > 1 else None,
            _expert_rank(name, experts // ep) if ep > 1 else None,
        )
        for name, shape in shapes.items()
    ]
    groups = _cut(((owner_stage(item.source, layers), item) for item in items), bucket_bytes)
    return SyncPlan(tuple(_lay_out(s, i, tp, pp) for s, i in groups), tp, ep, pp)


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The routing bias is a float32 buffer in a model of any dtype."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


def owner_stage(name: str, layers: Sequence[int]) -> int:
    """Pipeline stage that holds a tensor; layers beyond the last count to the last stage."""
    if not name.startswith("model.layers."):
        return 0 if name == "model.embed_tokens.weight" else len(layers) - 1
    stage = bisect_right(list(accumulate(layers)), int(name.split(".")[2]))
    return min(stage, len(layers) - 1)


def _expert_rank(name: str, per_rank: int) -> int | None:
    if ".mlp.experts." not in name:
        return None
    return int(name.split(".mlp.experts.")[1].split(".")[0]) // per_rank


def _cut(
    items: Iterable[tuple[int, Item]], bucket_bytes: int
) -> Iterator[tuple[int, tuple[Item, ...]]]:
    """Consecutive items of one stage that fit into `bucket_bytes`, with their stage."""
    stage, held, size = 0, [], 0
    for owner, item in items:
        if held and (owner != stage or size + item.nbytes > bucket_bytes):
            yield stage, tuple(held)
            held, size = [], 0
        stage = owner
        held.append(item)
        size += item.nbytes
    if held:
        yield stage, tuple(held)


def _lay_out(stage: int, items: tuple[Item, ...], tp: int, pp: int) -> Bucket:
    """Gives each item that travels its place in the buffer."""
    placed, size, cuts = {}, 0, 0
    ranges: dict[int, tuple[int, int]] = {}

    def place(item: Item, **fields) -> None:
        nonlocal size
        placed[item.name] = replace(item, offset=size, **fields)
        size += _aligned(item.nbytes)

    dense = [item for item in items if item.expert_rank is None]
    if pp > 1:
        for item in dense:
            if item.split is None:
                place(item)
    whole = size
    for item in dense:
        if item.split is not None:
            place(item, cut_offset=cuts)
            cuts += _aligned(item.nbytes // tp)
    for rank in sorted({item.expert_rank for item in items} - {None}):
        start = size
        for item in items:
            if item.expert_rank == rank:
                place(item)
        ranges[rank] = (start, size)
    return Bucket(
        stage,
        tuple(placed.get(item.name, item) for item in items),
        size,
        whole,
        cuts,
        tuple((rank, start, end) for rank, (start, end) in ranges.items()),
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
