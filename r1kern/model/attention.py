"""Multi-head latent attention by Megatron's plug-in points: norm, down projections, rope.

Shape legend: s rows of this rank's sequence (packed: tokens of the micro-batch), b batch (1 when
packed), n heads of this rank, d head dimension, T packed tokens, B sequences, S longest of them.
"""

from __future__ import annotations

from functools import partial

import megatron.core.transformer.multi_latent_attention as megatron_mla
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

from r1kern.model.core_attention import Packing


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
for _symbol in ("Linear", "HAVE_TE"):
    if not hasattr(megatron_mla, _symbol):
        raise RuntimeError(
            f"megatron.core.transformer.multi_latent_attention.{_symbol} is gone: "
            "r1kern/model/attention.py must be brought up to date with the installed megatron-core"
        )
megatron_mla.Linear = DuplicatedLinear
# Without Transformer Engine its classes are mock objects here, which `isinstance` refuses.
megatron_mla.HAVE_TE = megatron_te.HAVE_TE


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
        kv_latent = self.kv_layernorm(kv_latent)
        q_latent = hidden_states
        if c.q_lora_rank is not None:
            q_latent = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
        up_project = partial(self._up_project, packing=packed_seq_params)
        if self.recompute_up_proj:
            # fp8=None: any other value, the default included, asks for Transformer Engine.
            self.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=None)
            up_project = partial(self.qkv_up_checkpoint.checkpoint, up_project)
        q, k, v = up_project(q_latent, kv_latent, k_rope)
        return q, k, v, q_latent, kv_latent

    def _up_project(self, q_latent, kv_latent, k_rope, *, packing):
        """Latents [s, b, r], rotary key [s, b, d_rope] -> q, k, v (packed: without b)."""
        c = self.config
        kv = self.linear_kv_up_proj(kv_latent)[0]
        k_nope, v = kv.unflatten(-1, (-1, c.qk_head_dim + c.v_head_dim)).split(
            [c.qk_head_dim, c.v_head_dim], dim=-1
        )
        q_proj = self.linear_q_proj if c.q_lora_rank is None else self.linear_q_up_proj
        q = q_proj(q_latent)[0]
        q_nope, q_rope = q.unflatten(-1, (-1, self.q_head_dim)).split(
            [c.qk_head_dim, c.qk_pos_emb_head_dim], dim=-1
        )
        rope = self._rope(q.shape[0], packing)
        q_rope, k_rope = rope(q_rope), rope(k_rope.unsqueeze(-2))
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1)
        v = v.contiguous()
        if packing is not None:
            q, k, v = q.squeeze(1), k.squeeze(1), v.squeeze(1)
        return q, k, v

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
