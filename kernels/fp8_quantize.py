"""Blockwise FP8 of activations, gradients and weights: custom ops.

C++ on CPU (`csrc/fp8.h`), Triton on CUDA (`fp8_quantize_triton`); bit-equal to `fp8_reference`,
which has the layouts and the legend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern.kernels import fp8_reference as reference
from r1kern.kernels.fp8_reference import CODE, blocks, empty_row_scales, padded_rows

Codes = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("r1kern::fp8_quantize", mutates_args=(), device_types="cpu")
def quantize(
    x: Tensor, offsets: Tensor, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[R, K] once read -> codes [R, K], scales [KB, R], codes [K, P], scales [P / 128, K].

    Args:
        x: float32 or bfloat16.
        offsets: int64 [E + 1], first row of each expert, and R.
        rows, columns: what to make of it; the rest comes back empty ([0]).
    """
    nothing = x.new_empty(0, dtype=CODE), x.new_empty(0, dtype=torch.float32)
    row_wise = reference.quantize_rows(x, power_of_two) if rows else nothing
    nothing = tuple(t.clone() for t in nothing)
    by_column = reference.quantize_columns(x, offsets, power_of_two) if columns else nothing
    return *row_wise, *by_column


def empty_codes(R: int, K: int, E: int, device, rows: bool, columns: bool) -> Codes:
    """What `quantize` returns, unwritten."""

    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device=device)

    P = padded_rows(R, E)
    return (
        empty(R, K, dtype=CODE) if rows else empty(0, dtype=CODE),
        empty_row_scales(R, K, device) if rows else empty(0, dtype=torch.float32),
        empty(K, P, dtype=CODE) if columns else empty(0, dtype=CODE),
        empty(P // 128, K, dtype=torch.float32) if columns else empty(0, dtype=torch.float32),
    )


@quantize.register_fake
def _(x, offsets, power_of_two, rows, columns):
    return empty_codes(*x.shape, len(offsets) - 1, x.device, rows, columns)


@torch.library.custom_op("r1kern::fp8_quantize_weights", mutates_args=(), device_types="cpu")
def quantize_weights(
    weights: list[Tensor], parts: int, power_of_two: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """E weights [N, K] -> codes [E, N, K], the same [E, K, N], scales [E, NB, KB].

    Args:
        weights: float32 or bfloat16.
        parts: see `reference.quantize_weight`.
        transposed: whether to write the second; else it is empty ([0]).
    """
    made = [reference.quantize_weight(w, parts, power_of_two) for w in weights]
    codes = torch.stack([code for code, _ in made])
    other = codes.transpose(1, 2).contiguous() if transposed else codes.new_empty(0)
    return codes, other, torch.stack([scale for _, scale in made])


@quantize_weights.register_fake
def _(weights, parts, power_of_two, transposed):
    E, (N, K), like = len(weights), weights[0].shape, weights[0]
    return (
        like.new_empty(E, N, K, dtype=CODE),
        like.new_empty((E, K, N) if transposed else (0,), dtype=CODE),
        like.new_empty(E, parts * blocks(N // parts), blocks(K), dtype=torch.float32),
    )
