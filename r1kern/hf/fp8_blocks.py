"""DeepSeek-V3's FP8 weights: e4m3 codes with one float32 scale per block of 128 x 128.

Legend: M rows and N columns of a linear weight; a block at the lower or right edge may be partial,
so that the scales are [ceil(M / 128), ceil(N / 128)].
"""

from __future__ import annotations

import re

import torch

from r1kern.ops.fp8 import DTYPES, quantize_weights

BLOCK = 128
NAN = 0x7F  # the code, but for its sign
QUANTIZATION = {  # `quantization_config` of config.json
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
SCALE = "_scale_inv"  # of a weight's name; despite it, the factor that restores the weight

# The linear layers of attention, MLP, routed and shared experts, multi-token prediction's included.
# Embedding, head, norms, router (`mlp.gate`) and `eh_proj` are bf16 in the published files.
_QUANTISED = re.compile(
    r"model\.layers\.\d+\.(self_attn|mlp)\.(\w+\.)*\w+_proj(_with_mqa)?\.weight"
)


def is_quantised(name: str) -> bool:
    """Whether the published checkpoint stores this tensor in FP8."""
    return _QUANTISED.fullmatch(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[M, N] of the weight -> shape of its scales."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantize(
    weight: torch.Tensor, *, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales: scale = amax / 448 over the block, code = weight / scale rounded to e4m3.

    The rule of DeepSeek-V3 (arXiv 2412.19437, section 3.3), by `ops.quantize_weights`.  What it
    made, dequantised to float32 and quantised again, comes back bit for bit: 448 * fl(amax / 448)
    differs from amax by too little to change the quotient.  Through bf16 that holds if amax was a
    bf16 number; else the codes come back, and the scales move by bf16's rounding, once.  Scales
    that are no amax / 448 may move by one unit in the last place, once.

    Args:
        weight: [M, N], any float dtype.
        power_of_two: round the scales up to powers of two.

    Returns:
        float8_e4m3fn [M, N] and float32 [ceil(M / 128), ceil(N / 128)].

    Raises:
        FloatingPointError: a weight is not finite.
    """
    if weight.dtype not in DTYPES:
        weight = weight.float()
    made = quantize_weights([weight], power_of_two=power_of_two, transposed=False)
    codes, scales = made.codes[0], made.scales[0]
    if (codes.view(torch.uint8) & NAN == NAN).any() or not torch.isfinite(scales).all():
        raise FloatingPointError("a weight that is not finite cannot be quantised")
    return codes, scales


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Write codes * scales, multiplied in float32 and rounded to the dtype of `out`.

    A window [R, C] of the weight needs the scales of the blocks that it touches only.

    Args:
        codes: float8_e4m3fn [R, C], rows from `first_row` and columns from `first_column` on.
        scales: [ceil(M / 128), ceil(N / 128)] of the whole weight.
        out: [R, C], any float dtype and device.
    """
    rows, columns = codes.shape
    block_of_column = torch.arange(first_column, first_column + columns) // BLOCK
    done = 0
    while done < rows:
        block, offset = divmod(first_row + done, BLOCK)
        strip = slice(done, min(rows, done + BLOCK - offset))
        factors = scales[block, block_of_column].to(out.device, torch.float32)
        out[strip] = codes[strip].to(out.device).float() * factors
        done = strip.stop
