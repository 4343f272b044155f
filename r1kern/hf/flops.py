"""Exact floating-point operations of a model's forward, from its Hugging Face configuration.

Counts the multiplications and additions of all matrix products (a backward takes twice as many);
norms, rope, softmax and activations are left out, as in everybody's count.  Attention counts the
causal half: a token's own key and those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from transformers import PretrainedConfig

from r1kern.hf.scalar_head import has_scalar_head

Counts = TypeVar("Counts", int, np.ndarray)


@dataclass(frozen=True)
class ModelFlops:
    """Forward operations of the layers and of the head, by what they grow with.

    Attributes:
        token: of each token: projections, dense, shared and chosen routed experts, router.
        pair: of each pair of a query and a key that it sees, in all layers.
        head: of each row that predicts a completion token.
    """

    token: int
    pair: int
    head: int

    @classmethod
    def of(cls, hf: PretrainedConfig) -> ModelFlops:
        """DeepSeek-V3 (arXiv 2412.19437) or a dense model with grouped-query attention."""
        latent = hf.model_type == "deepseek_v3"
        layers, dense = hf.num_hidden_layers, hf.num_hidden_layers
        token = layers * (_latent_projections(hf) if latent else _projections(hf))
        if latent:
            dense = min(hf.first_k_dense_replace, layers)
            active = hf.num_experts_per_tok + hf.n_shared_experts
            experts = 3 * hf.moe_intermediate_size * active + hf.n_routed_experts
            token += (layers - dense) * 2 * hf.hidden_size * experts
        token += dense * 2 * hf.hidden_size * 3 * hf.intermediate_size
        width = attention_head_dim(hf) + (hf.v_head_dim if latent else attention_head_dim(hf))
        pair = layers * 2 * hf.num_attention_heads * width
        outputs = 1 if has_scalar_head(hf) else hf.vocab_size
        return cls(token, pair, 2 * hf.hidden_size * outputs)

    def sequence(self, length: Counts, completion: Counts) -> Counts:
        """Of a sequence with `length` rows, `completion` of which go through the head."""
        pairs = length * (length + 1) // 2
        return self.token * length + self.pair * pairs + self.head * completion


def sequence_flops(hf: PretrainedConfig, length: int, completion: int = 0) -> int:
    """Forward operations of one sequence; see `ModelFlops.sequence`."""
    return ModelFlops.of(hf).sequence(length, completion)


def _latent_projections(hf: PretrainedConfig) -> int:
    """Multi-head latent attention, per token and layer."""
    heads, hidden, queries = hf.num_attention_heads, hf.hidden_size, hf.hidden_size
    weights = hidden * (hf.kv_lora_rank + hf.qk_rope_head_dim)
    weights += hf.kv_lora_rank * heads * (hf.qk_nope_head_dim + hf.v_head_dim)
    weights += heads * hf.v_head_dim * hidden
    if hf.q_lora_rank is not None:
        weights += hidden * hf.q_lora_rank
        queries = hf.q_lora_rank
    weights += queries * heads * attention_head_dim(hf)
    return 2 * weights


def _projections(hf: PretrainedConfig) -> int:
    """Grouped-query attention, per token and layer."""
    heads = 2 * hf.num_attention_heads + 2 * hf.num_key_value_heads
    return 2 * hf.hidden_size * heads * attention_head_dim(hf)


def attention_head_dim(hf: PretrainedConfig) -> int:
    """Of queries and keys."""
    if hf.model_type == "deepseek_v3":
        return hf.qk_nope_head_dim + hf.qk_rope_head_dim
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
