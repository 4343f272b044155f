"""A tiny random DeepSeek-V3 in Hugging Face format, the shared starting point of the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def tiny_config(*, yarn: bool = False, mla: bool = False, **overrides) -> DeepseekV3Config:
    """One dense and two MoE layers: 16 experts in 4 groups, 2 groups and 4 experts a token.

    Args:
        yarn: YaRN rope, 64 positions stretched to 256.
        mla: the published latent sizes (kv_lora_rank 512, rope 64), which vLLM's CPU MLA needs.
        overrides: any field of `DeepseekV3Config`.
    """
    fields = dict(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        q_lora_rank=32,
        kv_lora_rank=512 if mla else 32,
        qk_rope_head_dim=64 if mla else 16,
        qk_nope_head_dim=32 if mla else 16,
        v_head_dim=32 if mla else 16,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        num_mtp_layers=0,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        rope_parameters=dict(YARN) if yarn else {"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    return DeepseekV3Config(**{**fields, **overrides})


@torch.no_grad()
def randomise(model: DeepseekV3ForCausalLM, seed: int) -> None:
    """Weights that leave nothing trivial: norms off 1, biases off 0, logits far from flat."""
    gen = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=gen)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.1 * noise)
        elif "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("embed_tokens.weight"):
            tensor.copy_(noise)
        elif tensor.dim() >= 2:
            gain = 2.0 if name.startswith("lm_head") else 1.0
            tensor.copy_(gain * noise / tensor.shape[-1] ** 0.5)


def write_tiny_model(
    path: str | Path, *, seed: int = 0, yarn: bool = False, mla: bool = False, **overrides
) -> DeepseekV3Config:
    """Writes `config.json` and `model.safetensors` (float32) that transformers and vLLM load.

    The tensors carry the published DeepSeek-V3 names (`mlp.experts.E.gate_proj.weight`, ...).

    Returns:
        The configuration; the weights are a function of it and `seed` alone.
    """
    config = tiny_config(yarn=yarn, mla=mla, **overrides)
    model = DeepseekV3ForCausalLM(config).float()
    randomise(model, seed)
    model.save_pretrained(path)
    return config


def write_tiny_mtp_model(path: str | Path, *, layers: int, depths: int) -> DeepseekV3ForCausalLM:
    """Writes a tiny model with multi-token prediction under the published names.

    Returns:
        It, float32, as a model of `layers + depths` layers, whose last ones are those of the MTP
        modules.
    """
    path = Path(path)
    write_tiny_model(path, seed=3, num_hidden_layers=layers + depths)
    model = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    for i in range(layers, layers + depths):
        own = f"model.layers.{i}."
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{own}{norm}.weight"] = 1 + 0.2 * torch.randn(64, generator=generator)
        joint = torch.randn(64, 128, generator=generator) / 128**0.5
        tensors[f"{own}eh_proj.weight"] = joint
        tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": depths}
    (path / "config.json").write_text(json.dumps(config))
    return model
