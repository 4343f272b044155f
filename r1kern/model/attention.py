"""Multi-head latent attention by Megatron's plug-in points: norm, down projections, rope, core.

Shape legend: s rows of this rank's sequence (packed: tokens of the micro-batch), b batch (1 when
packed), n heads of this rank, d head dimension, T packed tokens, B sequences, S longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import megatron.core.transformer.multi_latent_attention as megatron_mla
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, any dtype."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LatentNorm(RMSNorm):
    """Norm of the compressed query and key-value: Hugging Face fixes its epsilon at 1e-6."""

    def __init__(self, config, hidden_size: int, eps: float, **_):
        super().__init__(config, hidden_size, eps=1e-6)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer held whole by every tensor-parallel rank, over this rank's rows.

    Megatron's local spec shards MLA's down projections by columns; the gather behind them loses
    the sum over tensor-parallel ranks of the rotary key's gradient (a silent 7 % error at TP 2).
    Whole weights over sequence-parallel rows have no gather: Megatron sums their gradients over the
    ranks because `weight.sequence_parallel` is set.
    """

    def __init__(self, input_size: int, output_size: int, *, config, init_method, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            init_method(self.weight.data)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.linear(x, self.weight), None


# MLA accepts its down projections from a closed list of classes, of which this name is one.
if not hasattr(megatron_mla, "Linear"):
    raise RuntimeError(
        "megatron.core.transformer.multi_latent_attention.Linear is gone: "
        "r1kern/model/attention.py must be brought up to date with the installed megatron-core"
    )
megatron_mla.Linear = DuplicatedLinear


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
        """q, k [b, n, s, d_qk], v [b, n, s, d_v] -> [b, n, s, d_v]."""
        d_v = v.shape[-1]
        if d_v != q.shape[-1]:  # flash kernels want them equal; the fallback holds s x s scores
            v = F.pad(v, (0, q.shape[-1] - d_v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out[..., :d_v]


class MLASelfAttention(megatron_mla.MLASelfAttention):
    """Megatron's MLA with rope applied by each token's position.

    Megatron's packed path applies rope to one sequence after another (two kernel chains a sequence
    and layer); by position it is one chain for the whole micro-batch.  Also leaves out the gathers
    of column-sharded down projections (see `DuplicatedLinear`).
    """

    def get_query_key_value_tensors(
        self,
        hidden_states,
        key_value_states=None,
        position_ids=None,
        packed_seq_params=None,
        inference_context=None,
        *,
        inference_params=None,
    ):
        """hidden [s, b, h] -> q, k [s, b, n, d_qk], v [s, b, n, d_v] (packed: without b)."""
        assert inference_context is None and inference_params is None, "training only"
        c, tp_group = self.config, self.pg_collection.tp
        kv_latent, k_rope = self.linear_kv_down_proj(hidden_states)[0].split(
            [c.kv_lora_rank, c.qk_pos_emb_head_dim], dim=-1
        )
        if c.sequence_parallel:
            k_rope = gather_from_sequence_parallel_region(k_rope, group=tp_group)
        kv = self.linear_kv_up_proj(self.kv_layernorm(kv_latent))[0]
        k_nope, v = kv.unflatten(-1, (-1, c.qk_head_dim + c.v_head_dim)).split(
            [c.qk_head_dim, c.v_head_dim], dim=-1
        )
        q_latent = None
        if c.q_lora_rank is None:
            q = self.linear_q_proj(hidden_states)[0]
        else:
            q_latent = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
            q = self.linear_q_up_proj(q_latent)[0]
        q_nope, q_rope = q.unflatten(-1, (-1, self.q_head_dim)).split(
            [c.qk_head_dim, c.qk_pos_emb_head_dim], dim=-1
        )
        rope = self._rope(q.shape[0], packed_seq_params)
        q_rope, k_rope = rope(q_rope), rope(k_rope.unsqueeze(-2))
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1)
        if packed_seq_params is not None:
            q, k, v = q.squeeze(1), k.squeeze(1), v.squeeze(1)
        return q, k, v, q_latent, kv_latent

    def _rope(self, rows: int, packing: Packing | None):
        """The rotation of [s, b, n, d] by position, as a function."""
        length = rows if packing is None else packing.max_seqlen_q
        frequencies, mscale = self.rotary_pos_emb(length), 1.0
        if self.config.rope_type == "yarn":
            frequencies, mscale = frequencies
        if packing is not None:
            frequencies = frequencies[packing.positions]
        return lambda x: apply_rotary_pos_emb(
            x, frequencies, config=self.config, mscale=mscale, cp_group=self.pg_collection.cp
        )
