"""Grouped matrix products of blockwise FP8: custom ops.  A dense product is a group of one.

On CPU exact emulation: dequantised (C++, `csrc/fp8.h`) and multiplied in float32, an expert at a
time.  On CUDA each 128 of the reduction is summed by the tensor cores and promoted to float32
(arXiv 2412.19437, section 3.3.2): CUDA C++ on Hopper (`fp8_gemm_hopper`), else Triton
(`fp8_gemm_triton`).  The sizes of the groups stay on the device.  Layouts and legend:
`fp8_reference`.
"""

from __future__ import annotations

import functools
import logging
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from r1kern.errors import UserError
from r1kern.kernels.fp8_quantize import dequantize_columns, dequantize_rows, dequantize_weight
from r1kern.kernels.fp8_reference import BLOCK, padded_offsets

log = logging.getLogger(__name__)


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

    Raises:
        UserError: on CUDA, N / n_parts or K / k_parts that is no multiple of 128.
    """
    out = a.new_empty(len(a), b.shape[1], dtype=dtype)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start < end:
            rows = dequantize_rows(a[start:end], a_scales[:, start:end])
            weight = dequantize_weight(b[e], b_scales[e], n_parts, k_parts)
            if dtype == torch.float32:
                torch.mm(rows, weight.t(), out=out[start:end])
            else:
                out[start:end] = rows @ weight.t()
    return out


@grouped_gemm.register_kernel("cuda")
def _(a, a_scales, b, b_scales, offsets, n_parts, k_parts, dtype):
    _, N, K = b.shape
    _whole_blocks("N, the output's columns,", N, n_parts)
    _whole_blocks("K, the input's columns,", K, k_parts)
    out = a.new_empty(len(a), N, dtype=dtype)
    if out.numel():
        _module(a.device).grouped_gemm(a, a_scales, b, b_scales, offsets, out)
    return out


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

    Raises:
        UserError: on CUDA, N or K that is no multiple of 128, gradients that do not start at
            multiples of 16 bytes.
    """
    bounds = pairwise(padded_offsets(offsets).tolist())
    for grad, (start, end) in zip(grads, bounds, strict=True):
        if start < end:
            lines, tiles = slice(start, end), slice(start // BLOCK, end // BLOCK)
            left = dequantize_columns(a[:, lines], a_scales[tiles])
            grad.addmm_(left, dequantize_columns(b[:, lines], b_scales[tiles]).t())


@grouped_wgrad.register_kernel("cuda")
def _(a, a_scales, b, b_scales, offsets, grads):
    N, K = len(a), len(b)
    _whole_blocks("N, the weight's rows,", N)
    _whole_blocks("K, the weight's columns,", K)
    addresses = tuple(grad.data_ptr() for grad in grads)
    if any(address % 16 for address in addresses):
        raise UserError(
            "a weight's gradient must start at a multiple of 16 bytes: align its buffer"
        )
    if a.numel():
        table = _table(addresses, a.device)
        _module(a.device).grouped_wgrad(a, a_scales, b, b_scales, offsets, table, N, K)


@grouped_wgrad.register_fake
def _(a, a_scales, b, b_scales, offsets, grads):
    return None


@functools.cache
def _module(device: torch.device) -> ModuleType:
    """The kernels for a CUDA device, chosen once."""
    from r1kern.kernels import fp8_gemm_hopper, fp8_gemm_triton

    module = fp8_gemm_hopper if fp8_gemm_hopper.available(device) else fp8_gemm_triton
    log.info("FP8 products on %s: %s", device, module.__name__.rpartition(".")[2])
    return module


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [E] on the device, without a copy from the host in a CUDA graph's capture: matrices
    that lie evenly are counted there, any others' addresses kept from the first call."""
    steps = {after - before for before, after in pairwise(addresses)}
    if len(steps) > 1:
        return _kept_table(addresses, device)
    step = steps.pop() if steps else 1
    first = addresses[0]
    return torch.arange(first, first + step * len(addresses), step, device=device)


@functools.lru_cache(maxsize=4096)
def _kept_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, device=device)


def _whole_blocks(name: str, size: int, parts: int = 1) -> None:
    if size % (BLOCK * parts):
        raise UserError(
            f"{name} must be a multiple of {BLOCK * parts} for FP8 on a GPU, got {size}: pad it, "
            "or leave this weight in bfloat16"
        )
