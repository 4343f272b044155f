"""Which activations are computed again in the backward."""

from __future__ import annotations

import importlib.util

from r1kern.errors import UserError


def recompute_fields(parts: list[str]) -> dict:
    """Fields of `MLATransformerConfig` for `train.recompute`.

    Args:
        parts: of a layer whose activations are computed again in the backward; "full" alone keeps
            only each layer's input.

    Raises:
        UserError: "full" beside other parts, or parts that Megatron-core 0.16.1 recomputes by
            Transformer Engine only, without it.
    """
    if not parts:
        return {}
    if "full" in parts:
        if len(parts) > 1:
            raise UserError(
                "train.recompute: 'full' recomputes whole layers, leave the other parts out"
            )
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    missing = [p for p in parts if p in ("layernorm", "moe_act")]
    if missing and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"train.recompute: {', '.join(missing)} needs Transformer Engine, which is not "
            f"installed: leave it out, or take mla_up_proj, core_attn, mlp, moe, shared_experts "
            f"or full"
        )
    return {"recompute_granularity": "selective", "recompute_modules": list(parts)}
