"""A model's Hugging Face `config.json`, and whether a parallel layout fits it."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from r1kern.config import Model, Parallel
from r1kern.errors import UserError
from r1kern.hf.config_json import check_config_json
from r1kern.hf.dense import MODEL_TYPES, check_supported, is_dense
from r1kern.hf.layout import stage_layers


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """Read `config.json` of a DeepSeek-V3-architecture, Qwen2 or Llama-3 model.

    FP8 weights are restored on reading, so that `quantization_config` is checked and left out.

    Raises:
        UserError: no such file, not JSON, fields lacking or wrong, or another architecture.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: point model.path at a folder in Hugging Face format"
        )
    check_config_json(path)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    known = ("deepseek_v3", *MODEL_TYPES)
    if config.model_type not in known:
        raise UserError(
            f"{path}: model_type is '{config.model_type}', only {', '.join(known)} can be trained"
        )
    vars(config).pop("quantization_config", None)
    # transformers assumes one where the file says nothing; its own saves have no such weights.
    if not {"num_nextn_predict_layers", "num_mtp_layers"} & set(json.loads(path.read_text())):
        config.num_nextn_predict_layers = 0
    if is_dense(config):
        check_supported(config)
    return config


def check_mtp(hf: PretrainedConfig, model: Model) -> None:
    """Refuse a loss of multi-token prediction for a model without.

    Raises:
        UserError: one line.
    """
    if model.mtp_coef and not hf.num_nextn_predict_layers:
        raise UserError(
            f"model.mtp_coef={model.mtp_coef} but {model.path}/config.json has no "
            f"multi-token-prediction layers (num_nextn_predict_layers): set model.mtp_coef=0"
        )


def check_layout(hf: PretrainedConfig, parallel: Parallel, world_size: int) -> None:
    """Refuse a layout that cannot work, before any process group exists.

    Args:
        hf: the model.
        parallel: sizes of the trainer's groups and of the generator's replicas.
        world_size: processes of the job.

    Raises:
        UserError: one line with *all* violations, a suggestion with each.
    """
    p = parallel
    divides = [
        ("tp", p.tp, "num_attention_heads", hf.num_attention_heads),
        ("tp", p.tp, "vocab_size", hf.vocab_size),
        ("tp", p.tp, "intermediate_size", hf.intermediate_size),
        ("generator_tp", p.generator_tp, "num_attention_heads", hf.num_attention_heads),
        ("generator_tp", p.generator_tp, "world size", world_size),
    ]
    if is_dense(hf):
        divides.append(("tp", p.tp, "num_key_value_heads", hf.num_key_value_heads))
        divides.append(("ep", p.ep, "1 (a dense model has no experts)", 1))
    else:
        shared_width = hf.moe_intermediate_size * hf.n_shared_experts
        divides.append(("tp", p.tp, "shared expert width", shared_width))
        divides.append(("ep", p.ep, "n_routed_experts", hf.n_routed_experts))
    lines = [
        f"parallel.{axis}={size} does not divide {name}={value} (try {_nearest(size, value)})"
        for axis, size, name, value in divides
        if value % size
    ]
    lines += _stage_violations(hf.num_hidden_layers, p)
    if p.world_size not in (None, world_size):
        lines.append(
            f"parallel.world_size={p.world_size} but the job has {world_size} processes (start "
            f"{p.world_size} with torchrun, or change parallel.world_size)"
        )
    for axes, size in (("tp*pp", p.tp * p.pp), ("ep*pp", p.ep * p.pp)):
        if world_size % size:
            lines.append(
                f"{axes}={size} does not divide the world size {world_size} (start "
                f"{-(-world_size // size) * size} processes with torchrun --nproc-per-node)"
            )
    if lines:
        raise UserError("impossible layout: " + "; ".join(lines))


def _stage_violations(num_layers: int, p: Parallel) -> list[str]:
    if num_layers < p.pp:
        return [f"parallel.pp={p.pp} exceeds num_hidden_layers={num_layers} (try {num_layers})"]
    if p.layers and (len(p.layers) != p.pp or sum(p.layers) != num_layers):
        default = stage_layers(num_layers, p.model_copy(update={"layers": []}))
        return [
            f"parallel.layers={p.layers} must be {p.pp} numbers (parallel.pp) that add up to "
            f"num_hidden_layers={num_layers} (try {default})"
        ]
    return []


def _nearest(size: int, value: int) -> int:
    """The largest divisor of `value` up to `size`."""
    return max(n for n in range(1, size + 1) if value % n == 0)
