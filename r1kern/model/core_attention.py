"""Causal attention of packed sequences: the part between the projections.

Shape legend: s rows of this rank's sequence (packed: tokens of the micro-batch), b batch (1 when
packed), n heads of this rank, d head dimension, T packed tokens, B sequences, P places of grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from r1kern.model.attention_kernel import load_kernel

# Sequences up to this length share a grid: their padding costs less than a kernel call.
SHORT = 64


@dataclass
class Packing(PackedSeqParams):
    """Megatron's packed-sequence record with the indices that our attention wants.

    Attributes:
        positions: int64 [T], position of each token within its sequence.
        sequence_ids: int64 [T], the sequence of each token, -1 on padding.
    """

    positions: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, sequences: int | None = None) -> Packing:
        """From int32 [B + 1] offsets of the sequences; those from `sequences` on are padding."""
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        rows = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
        ids = torch.arange(len(lengths), device=cu_seqlens.device)
        if sequences is not None:
            ids[sequences:] = -1
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            positions=rows - cu_seqlens[:-1].long().repeat_interleave(lengths),
            sequence_ids=ids.repeat_interleave(lengths),
        )

    @cached_property
    def grids(self) -> Grids:
        """Where the tokens lie for kernels that want sequences of equal length."""
        return Grids.of(self.cu_seqlens_q)


@dataclass(frozen=True)
class Grids:
    """Packed sequences laid on a few rectangles of sequences of similar length, end to end.

    Attributes:
        shapes: (sequences, positions) of each rectangle.
        take: int64 [P], the token at each place, any where there is none.
        place: int64 [T], the place of each token.
    """

    shapes: list[tuple[int, int]]
    take: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor) -> Grids:
        """A rectangle's longest sequence is at most twice its shortest, or `SHORT`."""
        lengths = cu_seqlens.diff().tolist()
        order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
        shapes, first, widths = [], [0] * len(lengths), 0
        for b in order:
            if not shapes or shapes[-1][1] > max(SHORT, 2 * lengths[b]):
                shapes.append((0, lengths[b]))
            count, longest = shapes[-1]
            first[b] = widths
            shapes[-1] = (count + 1, longest)
            widths += longest
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
        shift = torch.tensor(first, device=starts.device) - starts
        tokens = torch.arange(int(cu_seqlens[-1]), device=starts.device)
        place = tokens + shift.repeat_interleave(lengths)
        return cls(shapes, tokens.new_zeros(widths).index_copy_(0, place, tokens), place)


class _Regrid(torch.autograd.Function):
    """`x[take]` whose backward is `grad[give]`: valid when every used row is used once.

    The rows that `give` leaves out (padding) must have no influence on the result.
    """

    @staticmethod
    def forward(ctx, x, take, give):
        ctx.save_for_backward(give)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx, grad):
        (give,) = ctx.saved_tensors
        return grad.index_select(0, give), None, None


class _Ungrid(torch.autograd.Function):
    """`x[flat]` whose backward puts the rows back and leaves padding at zero."""

    @staticmethod
    def forward(ctx, x, flat):
        ctx.save_for_backward(flat)
        ctx.rows = x.shape[0]
        return x.index_select(0, flat)

    @staticmethod
    def backward(ctx, grad):
        (flat,) = ctx.saved_tensors
        full = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return full.index_copy_(0, flat, grad), None


class CoreAttention(MegatronModule):
    """Causal scaled dot-product attention, dense [s, b, n, d] and packed [T, n, d].

    Packed, by the kernel that `attention_kernel.choose_kernel` left in the configuration: kernels
    for variable lengths take the sequences as they lie; SDPA takes them on `Grids`, where padding
    stands behind each sequence and the causal mask hides it from every real query.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale, **_):
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.varlen = load_kernel(getattr(config, "attention_kernel", "sdpa"))

    def forward(self, q, k, v, attention_mask, packed_seq_params=None, **_):
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (q, k, v)))
            return out.permute(2, 0, 1, 3).flatten(2)
        if self.varlen is None:
            return self._on_grids(q, k, v, packed_seq_params.grids).flatten(1)
        cu_seqlens, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        out = self.varlen(q, k, _widened(v, q), cu_seqlens, longest, self.softmax_scale)
        return out[..., : v.shape[-1]].flatten(1)

    def _on_grids(self, q, k, v, grids: Grids):
        """q, k, v [T, heads, d] -> [T, n, d_v]."""
        sizes = [count * longest for count, longest in grids.shapes]
        q, k, v = (_Regrid.apply(x, grids.take, grids.place).split(sizes) for x in (q, k, v))
        outs = []
        for shape, *qkv in zip(grids.shapes, q, k, v, strict=True):
            out = self._attend(*(x.unflatten(0, shape).transpose(1, 2) for x in qkv))
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return _Ungrid.apply(torch.cat(outs) if len(outs) > 1 else outs[0], grids.place)

    def _attend(self, q, k, v):
        """q [b, n, s, d_qk], k [b, g, s, d_qk], v [b, g, s, d_v] -> [b, n, s, d_v], g divides n."""
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, _widened(v, q), is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out[..., : v.shape[-1]]


def _widened(v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Flash kernels want d_v = d_qk; SDPA's fallback would hold s x s scores."""
    return F.pad(v, (0, q.shape[-1] - v.shape[-1])) if v.shape[-1] != q.shape[-1] else v
