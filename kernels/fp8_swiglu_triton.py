"""SwiGLU times probability, and its gradient, to FP8 in both layouts, each number read once.

A program has the tile of 128 x 128 of `fp8_quantize_triton`.  In backward it makes the gradients of
gate and up, two tiles.  Where I is no multiple of 128, tiles of the second do not lie on columns
that those of the first lie on: then a program makes one tile, and a number is read twice.

Shape legend: R rows sorted by expert, E experts, I columns of gate and of up, P rows padded.
"""

# ruff: noqa: E741

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kern.kernels.fp8_quantize import empty_codes
from r1kern.kernels.fp8_quantize_triton import SIGNATURE, grid, rows_of, write
from r1kern.kernels.fp8_reference import blocks, padded_rows

BLOCK = tl.constexpr(128)
FORWARD = dict(num_warps=16, num_stages=1)
BACKWARD = dict(num_warps=16, num_stages=1)


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
    E_PAD: tl.constexpr, POWER_OF_TWO: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tile, k = tl.program_id(1), tl.program_id(0) * BLOCK
    first, rows = rows_of(offsets, tile, E, E_PAD)
    if rows == 0:
        return
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, 1], tl.float32)
    prob = tl.load(probs + first + r, mask=r < rows, other=0.0)
    for part in tl.static_range(PARTS):
        column = k + part * I
        is_gate = c < I - column
        i = tl.where(is_gate, column + c, column + c - I)
        mask = (r < rows) & (i < I)
        at = h + first * K + (r * K + i)
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + I, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + first * I + (r * I + i), mask=mask, other=0.0).to(tl.float32)
        value, rest = _sigmoid(gate)
        silu = gate * value
        total += tl.sum(tl.where(is_gate, g * silu * up, 0.0), 1, keep_dims=True)
        slope = up * (value + silu * rest)
        write(
            g * prob * tl.where(is_gate, slope, silu), first, rows, tile, column, K, P,
            scale_stride, row_codes, row_scales, column_codes, column_scales,
            POWER_OF_TWO, True, True,
        )  # fmt: skip
        # What the first part read, the second finds in the cache: registers hold only one.
        tl.debug_barrier()
    at = partial + tl.program_id(0).to(tl.int64) * R + first + r
    tl.store(at, total, mask=r < rows)


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
            E_PAD=triton.next_power_of_2(E), POWER_OF_TWO=power_of_two, COLUMNS=columns, **FORWARD,
        )  # fmt: skip
    return codes


def swiglu_backward_quantize(
    grad: Tensor, h: Tensor, probs: Tensor, offsets: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `fp8_swiglu.swiglu_backward_quantize`."""
    grad, h, probs, offsets = (t.contiguous() for t in (grad, h, probs, offsets))
    (R, I), E = grad.shape, len(offsets) - 1
    paired = I % 128 == 0
    codes = empty_codes(R, 2 * I, E, h.device, True, True)
    programs = blocks(I) if paired else blocks(2 * I)
    partial = torch.empty(programs, R, dtype=torch.float32, device=h.device)
    if h.numel():
        _swiglu_backward_kernel[programs, padded_rows(R, E) // 128](
            grad, h, probs, offsets, *codes, partial,
            I, R, 2 * I, padded_rows(R, E), E, codes[1].stride(0),
            E_PAD=triton.next_power_of_2(E), POWER_OF_TWO=power_of_two, PARTS=2 if paired else 1, **BACKWARD,
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
                FORWARD, set(inputs) - {"E"},
            )  # fmt: skip
            inputs |= dict(grad=f"*{dtype}", partial="*fp32", I="i32", R="i32")
            for paired in (True, False):
                aligned = set(inputs) - ({"E"} if paired else {"E", "I", "K"})
                yield (
                    f"{dtype} {kind} {'paired' if paired else 'one tile'}",
                    _swiglu_backward_kernel, inputs, constexprs | dict(PARTS=2 if paired else 1),
                    BACKWARD, aligned,
                )  # fmt: skip
