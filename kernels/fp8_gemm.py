"""Grouped matrix products of blockwise FP8: custom ops.  A dense product is a group of one.

On CPU exact emulation: dequantised (C++, `csrc/fp8.h`) and multiplied in float32.  On CUDA each
128 of the reduction is summed by the tensor cores and promoted to float32 (arXiv 2412.19437,
section 3.3.2): CUDA C++ on Hopper (`fp8_gemm_hopper`), else Triton (`fp8_gemm_triton`).  The sizes
of the groups stay on the device.  Layouts and legend: `fp8_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern.kernels import fp8_reference as reference


@torch.library.custom_op("r1kern::fp8_grouped_gemm", mutates_args=(), device_types="cpu")
def grouped_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    n_parts: int,
    k_parts: int,
    dtype: torch.dtype,
) -> Tensor:
    """out[r] = a[r] @ b[e].T for the rows r of expert e.

    Args:
        a: e4m3 [R, K], rows sorted by expert.
        a_scales: float32 [KB, R].
        b: e4m3 [E, N, K].
        b_scales: float32 [E, NB, KB], any strides.
        offsets: int64 [E + 1], first row of each expert, and R.
        n_parts, k_parts: parts of b's N and K in which blocks start anew.
        dtype: of the result, float32 or bfloat16.

    Returns:
        [R, N].
    """
    return reference.grouped_gemm(a, a_scales, b, b_scales, offsets, n_parts, k_parts, dtype)


@grouped_gemm.register_fake
def _(a, a_scales, b, b_scales, offsets, n_parts, k_parts, dtype):
    return a.new_empty(len(a), b.shape[1], dtype=dtype)


@torch.library.custom_op("r1kern::fp8_grouped_wgrad", mutates_args=("grads",), device_types="cpu")
def grouped_wgrad(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, grads: list[Tensor]
) -> None:
    """grads[e] += a @ b.T over the rows of expert e: a weight's gradient, accumulated.

    Args:
        a: e4m3 [N, P], the output's gradient by columns.
        a_scales: float32 [P / 128, N].
        b: e4m3 [K, P], the input by columns.
        b_scales: float32 [P / 128, K].
        offsets: int64 [E + 1], first row of each expert before padding.
        grads: E contiguous float32 [N, K]; that of an empty expert is left alone.
    """
    reference.grouped_wgrad(a, a_scales, b, b_scales, offsets, grads)


@grouped_wgrad.register_fake
def _(a, a_scales, b, b_scales, offsets, grads):
    return None
