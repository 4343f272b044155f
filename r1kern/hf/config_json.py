"""Checks of a `config.json` before transformers, which fills its gaps with the 671B's sizes."""

from __future__ import annotations

import json
from pathlib import Path

from r1kern.errors import UserError
from r1kern.hf.fp8_blocks import BLOCK

_COMMON = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_DEEPSEEK_V3 = (
    "first_k_dense_replace",
    "kv_lora_rank",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "routed_scaling_factor",
    "topk_group",
    "v_head_dim",
)


def check_config_json(path: Path) -> None:
    """Refuse a file that says too little about the model, or weights that cannot be read.

    Raises:
        UserError: not a JSON object, fields lacking, or a quantisation other than FP8 in blocks of
            128 x 128.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(
            f"{path} has no 'model_type': give the config.json of a model in Hugging Face format"
        )
    required = _COMMON + (_DEEPSEEK_V3 if config["model_type"] == "deepseek_v3" else ())
    lacking = [field for field in required if field not in config]
    if lacking:
        raise UserError(
            f"{path} lacks {', '.join(lacking)}: download it again, or add what the weights were "
            f"made with"
        )
    _check_quantisation(path, config.get("quantization_config"))


def _check_quantisation(path: Path, found) -> None:
    if found is None:
        return
    wanted = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    got = {key: found.get(key) for key in wanted} if isinstance(found, dict) else found
    if got != wanted:
        raise UserError(
            f"{path}: quantization_config is {got}, only {wanted} can be read: take a bf16 "
            f"version of the model"
        )
