"""Causal attention of packed sequences: the part between the projections.

Shape legend: s rows of this rank's sequence (packed: tokens of the micro-batch), b batch (1 when
packed), n heads of this rank, d head dimension, T packed tokens, B sequences, S longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule


@dataclass
class Packing(PackedSeqParams):
    """Megatron's packed-sequence record with the indices that our attention wants.

    Attributes:
        positions: int64 [T], position of each token within its sequence.
        grid: int64 [B * S], the token at (sequence, position), 0 where there is none.
        flat: int64 [T], the place of each token in the [B * S] grid.
    """

    positions: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    flat: torch.Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor) -> Packing:
        """From int32 [B + 1] offsets of the sequences."""
        starts = cu_seqlens[:-1].long()
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        longest = int(lengths.max())
        column = torch.arange(longest, device=cu_seqlens.device)
        real = column < lengths[:, None]
        flat = real.flatten().nonzero().flatten()
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            positions=column.expand_as(real)[real],
            grid=torch.where(real, starts[:, None] + column, 0).flatten(),
            flat=flat,
        )


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

    Packed sequences are laid on a [B, S] grid: one kernel call whatever the number of sequences.
    Padding stands behind each sequence, where the causal mask hides it from every real query.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale, **_):
        super().__init__(config)
        self.softmax_scale = softmax_scale

    def forward(self, q, k, v, attention_mask, packed_seq_params=None, **_):
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (q, k, v)))
            return out.permute(2, 0, 1, 3).flatten(2)
        grid, flat = packed_seq_params.grid, packed_seq_params.flat
        shape = (-1, packed_seq_params.max_seqlen_q)
        q, k, v = (
            _Regrid.apply(x, grid, flat).unflatten(0, shape).transpose(1, 2) for x in (q, k, v)
        )
        out = self._attend(q, k, v).transpose(1, 2).flatten(0, 1)
        return _Ungrid.apply(out, flat).flatten(1)

    def _attend(self, q, k, v):
        """q [b, n, s, d_qk], k [b, g, s, d_qk], v [b, g, s, d_v] -> [b, n, s, d_v], g divides n."""
        d_v = v.shape[-1]
        if d_v != q.shape[-1]:  # flash kernels want them equal; the fallback holds s x s scores
            v = F.pad(v, (0, q.shape[-1] - d_v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out[..., :d_v]
