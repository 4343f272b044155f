"""SwiGLU times probability, and its gradient, to FP8 in both layouts at once.

A program has the tile of 128 x 128 of `fp8_quantize_triton`.  In backward the tiles of gate and up
with the same inputs are neighbours in the grid, so that the second finds them in the L2 cache: both
in one program are more than there are registers.

Shape legend: R rows sorted by expert, E experts, I columns of gate and of up, P rows padded.
"""

# ruff: noqa: E741

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kern.kernels import fp8_reference as reference
from r1kern.kernels.fp8_quantize import empty_codes
from r1kern.kernels.fp8_quantize_triton import SIGNATURE, grid, quantize, rows_of, write
from r1kern.kernels.fp8_reference import blocks, padded_rows

BLOCK = tl.constexpr(128)
OPTIONS = dict(num_warps=16, num_stages=1)


@triton.jit
def _swiglu_kernel(
    h, probs, offsets, row_codes, row_scales, column_codes, column_scales, K, P, E, scale_stride,
    E_PAD: tl.constexpr, POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile, k = tl.program_id(1), tl.program_id(0) * BLOCK
    first, rows = rows_of(offsets, tile, E, E_PAD)
    if rows == 0:
        return
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (c < K - k)
    at = h + first * (2 * K) + k + (r * (2 * K) + c)
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + K, mask=mask, other=0.0).to(tl.float32)
    prob = tl.load(probs + first + r, mask=r < rows, other=0.0)
    value, _ = _sigmoid(gate)
    write(
        gate * value * up * prob, first, rows, tile, k, K, P, scale_stride,
        row_codes, row_scales, column_codes, column_scales, POWER_OF_TWO, True, COLUMNS,
    )  # fmt: skip


@triton.jit
def _sigmoid(x):
    """It, and what it lacks of 1, without cancellation."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _swiglu_backward_kernel(
    grad, h, probs, offsets, row_codes, row_scales, column_codes, column_scales, partial,
    I, R, K, P, E, scale_stride,
    E_PAD: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    # Even programs have a tile of gate, odd ones that of up.
    program, tile = tl.program_id(0), tl.program_id(1)
    first, rows = rows_of(offsets, tile, E, E_PAD)
    if rows == 0:
        return
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    is_gate, i, mask = program % 2 == 0, program // 2 * BLOCK + c, r < rows
    at = h + first * K + (r * K + i)
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + I, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + first * I + (r * I + i), mask=mask, other=0.0).to(tl.float32)
    value, rest = _sigmoid(gate)
    silu = gate * value
    total = tl.sum(g * silu * up, 1, keep_dims=True)
    at = partial + (program // 2).to(tl.int64) * R + first + r
    tl.store(at, total, mask=r < tl.where(is_gate, rows, 0))
    slope = tl.where(is_gate, up * (value + silu * rest), silu)
    g *= tl.load(probs + first + r, mask=r < rows, other=0.0)
    write(
        g * slope, first, rows, tile, program // 2 * BLOCK + program % 2 * I, K, P, scale_stride,
        row_codes, row_scales, column_codes, column_scales, POWER_OF_TWO, True, True,
    )  # fmt: skip


def swiglu_quantize(
    h: Tensor, probs: Tensor, offsets: Tensor, power_of_two: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fp8_swiglu.swiglu_quantize`."""
    h, probs, offsets = h.contiguous(), probs.contiguous(), offsets.contiguous()
    R, I, E = len(h), h.shape[1] // 2, len(offsets) - 1
    codes = empty_codes(R, I, E, h.device, True, columns)
    if h.numel():
        _swiglu_kernel[grid(R, I, E)](
            h, probs, offsets, *codes, I, padded_rows(R, E), E, codes[1].stride(0),
            E_PAD=triton.next_power_of_2(E), POWER_OF_TWO=power_of_two, COLUMNS=columns, **OPTIONS,
        )  # fmt: skip
    return codes


def swiglu_backward_quantize(
    grad: Tensor, h: Tensor, probs: Tensor, offsets: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `fp8_swiglu.swiglu_backward_quantize`.

    Where I is no multiple of 128 a tile may hold columns of gate and of up; then in two steps.
    """
    grad, h, probs, offsets = (t.contiguous() for t in (grad, h, probs, offsets))
    (R, I), E = grad.shape, len(offsets) - 1
    if I % 128:
        grad_h, grad_probs = reference.swiglu_backward(grad, h, probs)
        return *quantize(grad_h, offsets, power_of_two, True, True), grad_probs
    codes = empty_codes(R, 2 * I, E, h.device, True, True)
    partial = torch.empty(blocks(I), R, dtype=torch.float32, device=h.device)
    if h.numel():
        _swiglu_backward_kernel[grid(R, 2 * I, E)](
            grad, h, probs, offsets, *codes, partial,
            I, R, 2 * I, padded_rows(R, E), E, codes[1].stride(0),
            E_PAD=triton.next_power_of_2(E), POWER_OF_TWO=power_of_two, **OPTIONS,
        )  # fmt: skip
    return *codes, partial.sum(0)


def variants():
    """(name, kernel, signature, constexprs, options, aligned) of what the launchers compile."""
    for dtype in ("fp32", "bf16"):
        for power_of_two in (False, True):
            kind = "pow2" if power_of_two else "fp32"
            inputs = dict(h=f"*{dtype}", probs="*fp32", **SIGNATURE)
            constexprs = dict(E_PAD=32, POWER_OF_TWO=power_of_two)
            yield (
                f"{dtype} {kind}", _swiglu_kernel, inputs, constexprs | dict(COLUMNS=True),
                OPTIONS, set(inputs) - {"E"},
            )  # fmt: skip
            inputs = inputs | dict(grad=f"*{dtype}", partial="*fp32", I="i32", R="i32")
            yield (
                f"{dtype} {kind}", _swiglu_backward_kernel, inputs, constexprs,
                OPTIONS, set(inputs) - {"E", "R"},
            )  # fmt: skip
