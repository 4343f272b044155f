"""Which Hugging Face tensor each Megatron parameter is made of.

Every Megatron parameter is the concatenation, along dimension 0, of one or two Hugging Face tensors
(gate and up projections are fused), each cut for this tensor-parallel rank along one dimension or
held whole; experts lie whole on one expert-parallel rank.  `Slot` says which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig

from r1kern.hf.dense import LAYER as DENSE_LAYER
from r1kern.hf.dense import dense_shapes, is_dense
from r1kern.hf.scalar_head import SCORE, has_scalar_head


@dataclass(frozen=True)
class Slot:
    """Where a parameter comes from.

    Attributes:
        names: Hugging Face tensors, concatenated along dimension 0.
        split: dimension cut over the tensor-parallel ranks, None when whole.
    """

    names: tuple[str, ...]
    split: int | None


OUTSIDE = {
    "embedding.word_embeddings.weight": Slot(("model.embed_tokens.weight",), 0),
    "decoder.final_layernorm.weight": Slot(("model.norm.weight",), None),
    "output_layer.weight": Slot(("lm_head.weight",), 0),
}

SCALAR_HEAD = Slot((SCORE,), None)  # of "output_layer.weight" in a model that has one

LAYER = {
    "input_layernorm.weight": (("input_layernorm.weight",), None),
    "self_attention.linear_q_proj.weight": (("self_attn.q_proj.weight",), 0),
    "self_attention.linear_q_down_proj.weight": (("self_attn.q_a_proj.weight",), None),
    "self_attention.q_layernorm.weight": (("self_attn.q_a_layernorm.weight",), None),
    "self_attention.linear_q_up_proj.weight": (("self_attn.q_b_proj.weight",), 0),
    "self_attention.linear_kv_down_proj.weight": (("self_attn.kv_a_proj_with_mqa.weight",), None),
    "self_attention.kv_layernorm.weight": (("self_attn.kv_a_layernorm.weight",), None),
    "self_attention.linear_kv_up_proj.weight": (("self_attn.kv_b_proj.weight",), 0),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), 1),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), None),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), 1),
    "mlp.router.weight": (("mlp.gate.weight",), None),
    "mlp.router.expert_bias": (("mlp.gate.e_score_correction_bias",), None),
    "mlp.shared_experts.linear_fc1.weight": (
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        0,
    ),
    "mlp.shared_experts.linear_fc2.weight": (("mlp.shared_experts.down_proj.weight",), 1),
    **DENSE_LAYER,
}

MTP = {
    "enorm.weight": (("enorm.weight",), None),
    "hnorm.weight": (("hnorm.weight",), None),
    "eh_proj.weight": (("eh_proj.weight",), 0),
    "final_layernorm.weight": (("shared_head.norm.weight",), None),
}

SHARED = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}

EXPERT = {
    "mlp.experts.linear_fc1.weight": ("gate_proj.weight", "up_proj.weight"),
    "mlp.experts.linear_fc2.weight": ("down_proj.weight",),
}


def hf_shapes(hf: PretrainedConfig, *, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, in the order `export_weights` yields them.

    Args:
        mtp: with the multi-token-prediction layers, the published copies of embedding and head in
            each of them included (see `shared_name`).  A generator that does not decode
            speculatively must not be sent them.
    """
    if is_dense(hf):
        return _with_head(dense_shapes(hf), hf)
    heads, nope, rope, v = (
        hf.num_attention_heads,
        hf.qk_nope_head_dim,
        hf.qk_rope_head_dim,
        hf.v_head_dim,
    )
    hidden, moe = hf.hidden_size, hf.moe_intermediate_size
    attention = {
        "kv_a_proj_with_mqa": (hf.kv_lora_rank + rope, hidden),
        "kv_a_layernorm": (hf.kv_lora_rank,),
        "kv_b_proj": (heads * (nope + v), hf.kv_lora_rank),
        "o_proj": (hidden, heads * v),
    }
    if hf.q_lora_rank is None:
        attention["q_proj"] = (heads * (nope + rope), hidden)
    else:
        attention["q_a_proj"] = (hf.q_lora_rank, hidden)
        attention["q_a_layernorm"] = (hf.q_lora_rank,)
        attention["q_b_proj"] = (heads * (nope + rope), hf.q_lora_rank)

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj.weight": (width, hidden),
            f"{prefix}up_proj.weight": (width, hidden),
            f"{prefix}down_proj.weight": (hidden, width),
        }

    shapes = {"model.embed_tokens.weight": (hf.vocab_size, hidden)}
    depths = hf.num_nextn_predict_layers if mtp else 0
    for i in range(hf.num_hidden_layers + depths):
        layer = f"model.layers.{i}."
        if i >= hf.num_hidden_layers:
            shapes |= {f"{layer}{n}": (hf.vocab_size, hidden) for n in SHARED}
            shapes |= {f"{layer}{n}.weight": (hidden,) for n in ("enorm", "hnorm")}
            shapes[f"{layer}eh_proj.weight"] = (hidden, 2 * hidden)
            shapes[f"{layer}shared_head.norm.weight"] = (hidden,)
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes |= {f"{layer}self_attn.{k}.weight": s for k, s in attention.items()}
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
        if i < hf.first_k_dense_replace:
            shapes |= mlp(f"{layer}mlp.", hf.intermediate_size)
            continue
        shapes[f"{layer}mlp.gate.weight"] = (hf.n_routed_experts, hidden)
        shapes[f"{layer}mlp.gate.e_score_correction_bias"] = (hf.n_routed_experts,)
        shapes |= mlp(f"{layer}mlp.shared_experts.", moe * hf.n_shared_experts)
        for e in range(hf.n_routed_experts):
            shapes |= mlp(f"{layer}mlp.experts.{e}.", moe)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (hf.vocab_size, hidden)
    return _with_head(shapes, hf)


def _with_head(shapes: dict[str, tuple[int, ...]], hf: PretrainedConfig) -> dict:
    """A language model's shapes, or those of the same model with the head that it has."""
    if has_scalar_head(hf):
        shapes.pop("lm_head.weight", None)
        shapes[SCORE] = (1, hf.hidden_size)
    return shapes


def shared_name(name: str) -> str:
    """The tensor of which `name` is a copy: itself but for an MTP layer's embedding and head.

    The published checkpoint repeats both in every multi-token-prediction layer.  The model has them
    once: on import the copies are not read, on export they are what the model has.
    """
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return SHARED.get(rest, name) if layer.isdigit() else name


def hf_splits(names: Iterable[str]) -> dict[str, int | None]:
    """Dimension in which tensor parallelism cuts each tensor; None for one that it does not."""
    by_stem = {stem: split for stems, split in (LAYER | MTP).values() for stem in stems}
    outside = {slot.names[0]: slot.split for slot in (*OUTSIDE.values(), SCALAR_HEAD)}
    splits = {}
    for name in names:
        source = shared_name(name)
        stem = source.split(".", 3)[-1]
        if source in outside:
            splits[name] = outside[source]
        else:
            splits[name] = None if stem.startswith("mlp.experts.") else by_stem[stem]
    return splits
