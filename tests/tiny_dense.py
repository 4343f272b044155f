"""Tiny random dense models in Hugging Face format: Qwen2 and Llama with Llama-3.1's rope."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def tiny_dense_config(kind: str, **overrides):
    """Eight query and four key-value heads of 16 on a hidden size of 64.

    Args:
        kind: "qwen2" or "llama" (rope of 32 positions stretched to 128).
        overrides: any field of the configuration.
    """
    fields = dict(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation="eager",
    )
    if kind == "llama":
        fields |= {"rope_parameters": dict(LLAMA3_ROPE)}
    return KINDS[kind][0](**{**fields, **overrides})


@torch.no_grad()
def write_tiny_dense(path: str | Path, kind: str, *, seed: int = 0, **overrides):
    """Writes `config.json` and `model.safetensors` (float32); norms off 1, biases off 0.

    Returns:
        The configuration; the weights are a function of it and `seed` alone.
    """
    config = tiny_dense_config(kind, **overrides)
    model = KINDS[kind][1](config).float()
    gen = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=gen)
        if "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.5 * noise)
        else:
            head = name.startswith("lm_head") or "embed_tokens" in name
            tensor.copy_((2.0 if head else 1.0) * noise / tensor.shape[-1] ** 0.5)
    model.save_pretrained(path)
    return config
