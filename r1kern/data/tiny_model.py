"""Architectures of the demos' models, everything present and everything small."""

from __future__ import annotations

from pathlib import Path

# As the 671B model.
DEEPSEEK = dict(
    model_type="deepseek_v3",
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=2,
    routed_scaling_factor=1.0,
    norm_topk_prob=True,
    max_position_embeddings=512,
    num_nextn_predict_layers=0,
    tie_word_embeddings=False,
    initializer_range=0.06,  # 0.02, made for wide models, starts a narrow one slowly
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    topk_method="noaux_tc",
    scoring_func="sigmoid",
)

# As the Qwen2.5 models that the paper distils into.
QWEN = dict(
    model_type="qwen2",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    initializer_range=0.06,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


def write_model(folder: Path, architecture: dict, tokenizer) -> Path:
    """A model folder without weights: configuration and tokenizer."""
    from transformers import AutoConfig

    options = dict(architecture)
    kind = options.pop("model_type")
    names = {"deepseek_v3": "DeepseekV3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=[names[kind]],
        dtype="float32",
        **options,
    )
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder
