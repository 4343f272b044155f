"""How each tensor is stored: as it is, in bf16, in float32, or in DeepSeek-V3's FP8 layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from r1kern.errors import UserError
from r1kern.hf.fp8_blocks import QUANTIZATION, SCALE, is_quantised, quantize

ExportDtype = Literal["bf16", "fp32", "fp8"]


def stored_dtype(name: str, dtype: ExportDtype) -> torch.dtype:
    """Of one tensor; the router's bias is float32 always, as published."""
    if dtype == "fp8" and is_quantised(name):
        return torch.float8_e4m3fn
    if dtype == "fp32" or name.endswith("e_score_correction_bias"):
        return torch.float32
    return torch.bfloat16


def encode(
    name: str, tensor: torch.Tensor, dtype: ExportDtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, followed by its scales when it becomes FP8.

    Raises:
        UserError: a value that is not finite, in a tensor that becomes FP8.
    """
    target = stored_dtype(name, dtype)
    if target != torch.float8_e4m3fn:
        yield name, tensor.to(target)
        return
    try:
        codes, scales = quantize(tensor)
    except FloatingPointError as error:
        raise UserError(
            f"'{name}' has values that are not finite and cannot be stored in FP8: the model is "
            f"damaged, export an earlier one"
        ) from error
    yield name, codes
    yield name + SCALE, scales


def describe(config: dict, dtype: ExportDtype) -> dict:
    """A `config.json` that says how the weights are stored."""
    kept = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    kept["dtype"] = "float32" if dtype == "fp32" else "bfloat16"
    if dtype == "fp8":
        kept["quantization_config"] = QUANTIZATION
    return kept
