"""Dense Qwen2/Qwen2.5 and Llama-3 by Megatron's plug-in points: attention and layer spec.

Shape legend: s rows of this rank's sequence (packed: tokens of the micro-batch), S the rows of all
tensor-parallel ranks, b batch (1 when packed), n query heads and g key-value heads of this rank, d
head dimension, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings import RotaryEmbedding, apply_rotary_pos_emb
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import (
    linear_with_grad_accumulation_and_async_allreduce as column_parallel_product,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from r1kern.model.attention import RMSNorm
from r1kern.model.core_attention import CoreAttention


@dataclass
class DenseConfig(TransformerConfig):
    """Megatron's configuration with what a dense model says beyond it.

    Attributes:
        rotary_base: theta of rope.
        rope_scaling: arguments of Llama-3.1's scaling (see `scale_rope`), None for plain rope.
        tied_embeddings: the head is the embedding.
    """

    rotary_base: float = 10000.0
    rope_scaling: dict[str, float] | None = None
    tied_embeddings: bool = False


class QKVLinear(MegatronModule):
    """Query, key and value projections: parameters of their own, computed as one product.

    Megatron fuses them into one parameter interleaved by key-value head.  Apart they are Hugging
    Face's tensors cut by rows; together they gather sequence-parallel rows once.
    """

    part = ColumnParallelLinear  # what each projection is

    def __init__(self, input_size, output_size, *, config, init_method, bias, tp_group, **_):
        super().__init__(config)
        queries = config.num_attention_heads * config.kv_channels
        keys = config.num_query_groups * config.kv_channels
        assert output_size == queries + 2 * keys
        self.tp_group = tp_group
        self.q, self.k, self.v = (
            self.part(
                input_size,
                size,
                config=config,
                init_method=init_method,
                bias=bias,
                tp_group=tp_group,
            )
            for size in (queries, keys, keys)
        )

    def forward(self, hidden):
        """[s, b, H] -> q [S, b, n d], k and v [S, b, g d]."""
        parts = self.q, self.k, self.v
        out = column_parallel_product(
            hidden,
            torch.cat([part.weight for part in parts]),
            None if self.q.bias is None else torch.cat([part.bias for part in parts]),
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.q.allreduce_dgrad,
            sequence_parallel=self.q.sequence_parallel,
            tp_group=self.tp_group,
        )
        return out.split([part.weight.shape[0] for part in parts], dim=-1)


class GroupedQueryAttention(SelfAttention):
    """Megatron's self-attention with `QKVLinear` and rope by each token's position.

    Megatron's packed path applies rope to one sequence after another; by position it is one chain
    of kernels for the whole micro-batch.
    """

    def forward(
        self, hidden_states, attention_mask, rotary_pos_emb=None, packed_seq_params=None, **unused
    ):
        """hidden [s, b, H], frequencies [longest, 1, 1, d] -> [s, b, H] and no bias."""
        assert all(value is None for value in unused.values()), "training only"
        frequencies = rotary_pos_emb
        if packed_seq_params is not None:
            frequencies = frequencies[packed_seq_params.positions]
        head_dim = self.hidden_size_per_attention_head
        q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in self.linear_qkv(hidden_states))
        q, k = (
            apply_rotary_pos_emb(x, frequencies, config=self.config, cp_group=self.pg_collection.cp)
            for x in (q, k)
        )
        if packed_seq_params is not None:
            q, k, v = q.squeeze(1), k.squeeze(1), v.squeeze(1)
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        out = attend(q, k, v, attention_mask, packed_seq_params=packed_seq_params)
        return self.linear_proj(out if packed_seq_params is None else out.unsqueeze(1))


def scale_rope(rope: RotaryEmbedding, config: DenseConfig) -> None:
    """Stretch the frequencies as Llama-3.1 does.

    Wavelengths over `original_max_position_embeddings / low_freq_factor` grow by `factor`, those
    under `... / high_freq_factor` stay, the others lie between (arXiv 2407.21783; Meta's
    `apply_scaling`).  Megatron itself takes only `factor` from outside.
    """
    if config.rope_scaling is not None:
        rope.inv_freq = rope._apply_scaling(rope.inv_freq, **config.rope_scaling)


def dense_layer_spec() -> ModuleSpec:
    attention = ModuleSpec(
        module=GroupedQueryAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=QKVLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear
        ),
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
