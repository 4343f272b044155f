"""Miniatures of DeepSeek-V3's published files: shards, index, FP8 with block scales, MTP layer.

Written without the code under test, block by block.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_model import tiny_config
from transformers import DeepseekV3Config

INDEX = "model.safetensors.index.json"
QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def ragged_config(**overrides) -> DeepseekV3Config:
    """Two layers and an MTP layer; no size and no half of one is a multiple of 128."""
    sizes = dict(
        hidden_size=192,
        intermediate_size=320,
        moe_intermediate_size=160,
        num_hidden_layers=2,
        n_routed_experts=8,
        q_lora_rank=96,
        kv_lora_rank=72,
        qk_rope_head_dim=16,
        qk_nope_head_dim=24,
        v_head_dim=40,
        num_mtp_layers=1,
    )
    return tiny_config(**{**sizes, **overrides})


def layer_shapes(config, layer: int) -> dict[str, tuple[int, ...]]:
    """A layer's tensors by the published names."""
    c, heads = config, config.num_attention_heads
    attention = {
        "q_a_proj": (c.q_lora_rank, c.hidden_size),
        "q_a_layernorm": (c.q_lora_rank,),
        "q_b_proj": (heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank),
        "kv_a_proj_with_mqa": (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
        "kv_a_layernorm": (c.kv_lora_rank,),
        "kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj": (c.hidden_size, heads * c.v_head_dim),
    }
    shapes = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}

    def mlp(prefix, width):
        shapes[f"{prefix}.gate_proj.weight"] = (width, c.hidden_size)
        shapes[f"{prefix}.up_proj.weight"] = (width, c.hidden_size)
        shapes[f"{prefix}.down_proj.weight"] = (c.hidden_size, width)

    if layer < c.first_k_dense_replace:
        mlp("mlp", c.intermediate_size)
    else:
        shapes["mlp.gate.weight"] = (c.n_routed_experts, c.hidden_size)
        shapes["mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
        mlp("mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
        for expert in range(c.n_routed_experts):
            mlp(f"mlp.experts.{expert}", c.moe_intermediate_size)
    shapes["input_layernorm.weight"] = (c.hidden_size,)
    shapes["post_attention_layernorm.weight"] = (c.hidden_size,)
    if layer >= c.num_hidden_layers:
        shapes["embed_tokens.weight"] = (c.vocab_size, c.hidden_size)
        shapes["enorm.weight"] = shapes["hnorm.weight"] = (c.hidden_size,)
        shapes["eh_proj.weight"] = (c.hidden_size, 2 * c.hidden_size)
        shapes["shared_head.norm.weight"] = (c.hidden_size,)
        shapes["shared_head.head.weight"] = (c.vocab_size, c.hidden_size)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def all_shapes(config) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        shapes |= layer_shapes(config, layer)
    shapes["model.norm.weight"] = (config.hidden_size,)
    return shapes | {"lm_head.weight": (config.vocab_size, config.hidden_size)}


def in_fp8(name: str) -> bool:
    """Every projection but `eh_proj`, by the listing of the published headers."""
    return "_proj" in name and "eh_proj" not in name


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block at a time: scale = amax / 448, code = weight / scale."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([math.ceil(n / 128) for n in weight.shape])
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            window = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = weight[window].float().abs().max() / 448
            codes[window] = (weight[window].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [M, N]."""
    values = codes.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scales[i, j]
    return values


def write_published(folder: Path, *, fp8: bool, shards: int = 5, seed: int = 0) -> dict:
    """Tensors as stored, by name; each shard has some, and scales lie apart from their weights."""
    config, gen = ragged_config(), torch.Generator().manual_seed(seed)
    stored = {}
    for name, shape in all_shapes(config).items():
        tensor = torch.randn(shape, generator=gen) * shape[-1] ** -0.5
        if name.endswith("e_score_correction_bias"):
            stored[name] = tensor
        elif fp8 and in_fp8(name):
            stored[name], stored[name + "_scale_inv"] = quantise(tensor.bfloat16())
        else:
            stored[name] = tensor.bfloat16()
    for name in stored:  # the MTP layer repeats embedding and head
        if name.endswith((".embed_tokens.weight", ".shared_head.head.weight")):
            copied = "model.embed_tokens" if ".embed_tokens." in name else "lm_head"
            stored[name] = stored[f"{copied}.weight"].clone()
    files = {name: i * shards // len(stored) for i, name in enumerate(stored)}
    for name in stored:
        if name.endswith("o_proj.weight_scale_inv"):
            files[name] = (files[name] + 1) % shards
    folder.mkdir(parents=True)
    write_shards(folder, stored, files, shards)
    write_config(folder, config, fp8=fp8)
    (folder / "tokenizer.json").write_text("{}")
    return stored


def write_shards(folder: Path, stored: dict, files: dict[str, int], shards: int) -> None:
    names = [f"model-{i + 1:05d}-of-{shards:06d}.safetensors" for i in range(shards)]
    for i, file in enumerate(names):
        save_file({name: stored[name] for name in stored if files[name] == i}, folder / file)
    total = sum(t.nbytes for t in stored.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[i] for name, i in files.items()},
    }
    (folder / INDEX).write_text(json.dumps(index))


def write_config(folder: Path, config, *, fp8: bool) -> None:
    config.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    if fp8:
        fields["quantization_config"] = QUANTISATION
    (folder / "config.json").write_text(json.dumps(fields))


def restored(stored: dict) -> dict[str, torch.Tensor]:
    """float32 values of FP8 weights, others as stored; no scales."""
    return {
        name: dequantise(tensor, stored[name + "_scale_inv"])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
