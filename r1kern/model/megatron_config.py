"""Hugging Face configuration -> Megatron-core transformer configuration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig
from transformers import PretrainedConfig

from r1kern.config import Parallel
from r1kern.hf.dense import dense_fields, is_dense
from r1kern.hf.layout import megatron_layout, stage_layers
from r1kern.model.dense import DenseConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_megatron_config(
    hf: PretrainedConfig,
    *,
    tp: int,
    ep: int,
    pp: int,
    dtype: torch.dtype,
    layers: list[int] | None = None,
    mtp: bool = False,
    **overrides,
) -> MLATransformerConfig | DenseConfig:
    """Megatron-core configuration of a DeepSeek-V3 (arXiv 2412.19437) or a dense model.

    Args:
        hf: transformers' `DeepseekV3Config`, `Qwen2Config` or `LlamaConfig`.
        tp, ep, pp: parallel sizes; sequence parallelism is on whenever tp > 1.
        dtype: of parameters and activations.
        layers: of each pipeline stage; None: `stage_layers`' default.
        mtp: build the multi-token-prediction layers, on the last stage.
        overrides: fields of the result, for what is not in `config.json`.
    """
    mtp_layers = hf.num_nextn_predict_layers if mtp else 0
    layers = layers or stage_layers(hf.num_hidden_layers, Parallel(pp=pp))
    shared = _shared_fields(tp, ep, pp, dtype) | {
        "pipeline_model_parallel_layout": megatron_layout(layers, mtp_layers)
    }
    if is_dense(hf):
        return DenseConfig(**{**dense_fields(hf), **shared, **overrides})
    rope = dict(hf.rope_parameters)
    yarn = rope.get("rope_type", "default") == "yarn"
    fields = dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        ffn_hidden_size=hf.intermediate_size,
        layernorm_epsilon=hf.rms_norm_eps,
        init_method_std=hf.initializer_range,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        # attention
        multi_latent_attention=True,
        q_lora_rank=hf.q_lora_rank,
        kv_lora_rank=hf.kv_lora_rank,
        qk_head_dim=hf.qk_nope_head_dim,
        qk_pos_emb_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
        rope_type="yarn" if yarn else "rope",
        rotary_base=rope["rope_theta"],
        # Megatron's default factor of 40 would reach the softmax scale of plain rope too.
        rotary_scaling_factor=rope["factor"] if yarn else 1.0,
        original_max_position_embeddings=rope.get("original_max_position_embeddings", 4096),
        beta_fast=rope.get("beta_fast", 32),
        beta_slow=rope.get("beta_slow", 1),
        mscale=rope.get("mscale", 1.0),
        mscale_all_dim=rope.get("mscale_all_dim", 0.0) or 0.0,
        rotary_interleaved=False,  # MLA de-interleaves by itself
        apply_rope_fusion=False,
        # experts
        num_moe_experts=hf.n_routed_experts,
        moe_ffn_hidden_size=hf.moe_intermediate_size,
        moe_shared_expert_intermediate_size=hf.moe_intermediate_size * hf.n_shared_experts,
        moe_layer_freq=[int(i >= hf.first_k_dense_replace) for i in range(hf.num_hidden_layers)],
        moe_router_topk=hf.num_experts_per_tok,
        moe_router_num_groups=hf.n_group,
        moe_router_group_topk=hf.topk_group,
        moe_router_topk_scaling_factor=hf.routed_scaling_factor,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,  # `balance.finish_update` does it, after the optimizer
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_permute_fusion=False,
        moe_grouped_gemm=True,
        mtp_num_layers=mtp_layers or None,
    )
    return MLATransformerConfig(**{**fields, **shared, **overrides})


def _shared_fields(tp: int, ep: int, pp: int, dtype: torch.dtype) -> dict:
    """Numerics and parallelism, alike for every model."""
    return dict(
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=pp,
        variable_seq_lengths=pp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss arrives divided by its global denominator, so that gradients are summed as
        # they are over micro-batches and ranks.
        calculate_per_token_loss=True,
    )
