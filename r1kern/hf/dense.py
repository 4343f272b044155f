"""Hugging Face's dense models, Qwen2/Qwen2.5 and Llama-3: names, shapes, sizes, limits.

Free of Megatron: a model and its options are judged before any process group exists.
"""

from __future__ import annotations

import torch.nn.functional as F
from transformers import PretrainedConfig

from r1kern.config import Experts, Model
from r1kern.errors import UserError

MODEL_TYPES = ("qwen2", "llama")

# Megatron parameter of a layer -> Hugging Face tensors and cut dimension, as `names.Slot`
LAYER = {
    f"self_attention.linear_qkv.{x}.{kind}": ((f"self_attn.{x}_proj.{kind}",), 0)
    for x in "qkv"
    for kind in ("weight", "bias")
}

_ROPE_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def is_dense(hf: PretrainedConfig) -> bool:
    return hf.model_type in MODEL_TYPES


def head_dim(hf: PretrainedConfig) -> int:
    """Of queries, keys and values; not always hidden_size / heads."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def has_qkv_bias(hf: PretrainedConfig) -> bool:
    return hf.model_type == "qwen2"


def dense_shapes(hf: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """See `names.hf_shapes`; with tied embeddings there is no `lm_head.weight`."""
    hidden, width, d = hf.hidden_size, hf.intermediate_size, head_dim(hf)
    queries, keys = hf.num_attention_heads * d, hf.num_key_value_heads * d
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for x, rows in (("q", queries), ("k", keys), ("v", keys)):
        layer[f"self_attn.{x}_proj.weight"] = (rows, hidden)
        if has_qkv_bias(hf):
            layer[f"self_attn.{x}_proj.bias"] = (rows,)
    layer |= {
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
    }
    shapes = {"model.embed_tokens.weight": (hf.vocab_size, hidden)}
    for i in range(hf.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not hf.tie_word_embeddings:
        shapes["lm_head.weight"] = (hf.vocab_size, hidden)
    return shapes


def dense_fields(hf: PretrainedConfig) -> dict:
    """The fields of `dense.DenseConfig` that come from `config.json`."""
    rope = hf.rope_parameters
    scaled = rope.get("rope_type", "default") == "llama3"
    return dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        ffn_hidden_size=hf.intermediate_size,
        layernorm_epsilon=hf.rms_norm_eps,
        init_method_std=hf.initializer_range,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=has_qkv_bias(hf),
        rotary_base=rope["rope_theta"],
        rope_scaling={key: rope[key] for key in _ROPE_SCALING} if scaled else None,
        rotary_interleaved=False,
        apply_rope_fusion=False,
        tied_embeddings=hf.tie_word_embeddings,
        # Checked under pipeline parallelism even where there are no experts.
        moe_token_dispatcher_type="alltoall",
    )


def check_supported(hf: PretrainedConfig) -> None:
    """Refuse a dense model with parts that the trainer does not have.

    Raises:
        UserError: one line with *all* of them.
    """
    rope = hf.rope_parameters.get("rope_type", "default")
    lacking = [
        (rope not in ("default", "llama3"), f"rope_type '{rope}' (known: default, llama3)"),
        (hf.hidden_act != "silu", f"hidden_act '{hf.hidden_act}' (known: silu)"),
        ("sliding_attention" in (getattr(hf, "layer_types", None) or ()), "sliding-window layers"),
        (hf.model_type == "llama" and hf.attention_bias, "attention_bias"),
        (getattr(hf, "mlp_bias", False), "mlp_bias"),
    ]
    if found := [name for is_lacking, name in lacking if is_lacking]:
        raise UserError(
            f"this {hf.model_type} model cannot be trained, it has {', '.join(found)}: choose a "
            f"model without, such as Qwen2.5 or Llama 3"
        )


def refuse_moe_options(hf: PretrainedConfig, model: Model, experts: Experts) -> None:
    """Refuse options that only a mixture of experts has a meaning for, on a dense model.

    Raises:
        UserError: one line with *all* of them.
    """
    if not is_dense(hf):
        return
    default = Experts()
    found = [f"experts.{name}" for name, value in experts if value != getattr(default, name)]
    if model.mtp_coef:
        found.append("model.mtp_coef")
    if found:
        raise UserError(
            f"{', '.join(found)}: {hf.model_type} is a dense model without experts and "
            f"multi-token prediction; remove the option"
        )
