"""Blockwise FP8 of activations, gradients and weights: custom ops.

C++ on CPU (`csrc/fp8.h`), Triton on CUDA (`fp8_quantize_triton`); bit-equal to `fp8_reference`,
which has the layouts and the legend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern import _C
from r1kern.kernels.fp8_reference import BLOCK, CODE, blocks, empty_row_scales, padded_rows

Codes = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("r1kern::fp8_quantize", mutates_args=(), device_types="cpu")
def quantize(
    x: Tensor, offsets: Tensor, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[R, K] once read -> codes [R, K], scales [KB, R], codes [K, P], scales [P / 128, K].

    On CUDA, of codes and scales by column, those past the last expert's rows are not written.

    Args:
        x: float32 or bfloat16.
        offsets: int64 [E + 1], first row of each expert, and R.
        rows, columns: what to make of it; the rest comes back empty ([0]).
    """
    x, offsets, E = x.contiguous(), offsets.contiguous(), len(offsets) - 1
    codes = empty_codes(*x.shape, E, x.device, rows, columns)
    _C.fp8_quantize(
        *(x.itemsize, x.data_ptr(), *x.shape, offsets.data_ptr(), E, power_of_two),
        *(*addresses(codes), torch.get_num_threads()),
    )
    return codes


@quantize.register_kernel("cuda")
def _(x, offsets, power_of_two, rows, columns):
    from r1kern.kernels import fp8_quantize_triton

    return fp8_quantize_triton.quantize(x, offsets, power_of_two, rows, columns)


def empty_codes(R: int, K: int, E: int, device, rows: bool, columns: bool) -> Codes:
    """What `quantize` returns, unwritten."""

    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device=device)

    P = padded_rows(R, E)
    return (
        empty(R, K, dtype=CODE) if rows else empty(0, dtype=CODE),
        empty_row_scales(R, K, device) if rows else empty(0, dtype=torch.float32),
        empty(K, P, dtype=CODE) if columns else empty(0, dtype=CODE),
        empty(P // BLOCK, K, dtype=torch.float32) if columns else empty(0, dtype=torch.float32),
    )


def addresses(codes: Codes) -> tuple[int, ...]:
    """Of `empty_codes`, as the C++ functions take them: 0 for what is empty."""
    row_codes, row_scales, column_codes, column_scales = codes
    return (
        row_codes.data_ptr(),
        row_scales.data_ptr(),
        row_scales.stride(0),
        column_codes.data_ptr(),
        column_scales.data_ptr(),
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
    codes, codes_t, scales = empty_weights(weights, parts, transposed)
    for e, weight in enumerate(weights):
        weight = weight.contiguous()
        _C.fp8_quantize_weight(
            *(weight.itemsize, weight.data_ptr(), *weight.shape, parts, power_of_two),
            *(codes[e].data_ptr(), codes_t[e].data_ptr() if transposed else 0),
            *(scales[e].data_ptr(), torch.get_num_threads()),
        )
    return codes, codes_t, scales


@quantize_weights.register_kernel("cuda")
def _(weights, parts, power_of_two, transposed):
    from r1kern.kernels import fp8_quantize_triton

    return fp8_quantize_triton.quantize_weights(weights, parts, power_of_two, transposed)


def empty_weights(
    weights: list[Tensor], parts: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_weights` returns, unwritten."""
    E, (N, K), like = len(weights), weights[0].shape, weights[0]
    return (
        like.new_empty(E, N, K, dtype=CODE),
        like.new_empty((E, K, N) if transposed else (0,), dtype=CODE),
        like.new_empty(E, parts * blocks(N // parts), blocks(K), dtype=torch.float32),
    )


@quantize_weights.register_fake
def _(weights, parts, power_of_two, transposed):
    return empty_weights(weights, parts, transposed)


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [R, K], scales [KB, R] -> float32 [R, K].  On CPU, as the two that follow."""
    return _dequantize(codes, scales.t(), 1)


def dequantize_columns(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [K, P], scales [P / 128, K] -> float32 [K, P]."""
    return _dequantize(codes, scales.t(), 1)


def dequantize_weight(
    codes: Tensor, scales: Tensor, row_parts: int = 1, column_parts: int = 1
) -> Tensor:
    """Codes [N, K], scales [NB, KB] -> float32 [N, K]; blocks start anew in each part."""
    return _dequantize(codes, scales, BLOCK, row_parts, column_parts)


def _dequantize(
    codes: Tensor, scales: Tensor, height: int, row_parts: int = 1, column_parts: int = 1
) -> Tensor:
    """Blocks of `height` x 128; scales of any strides, lines of codes any distance apart."""
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    out = torch.empty(codes.shape, dtype=torch.float32)
    if out.numel():
        _C.fp8_dequantize(
            *(codes.data_ptr(), scales.data_ptr(), *codes.shape, codes.stride(0), height),
            *(row_parts, column_parts, *scales.stride(), out.data_ptr(), torch.get_num_threads()),
        )
    return out
