"""Blockwise FP8 on a GPU: each number is read once and written in both layouts.

A program has a tile of 128 rows of one expert and 128 columns: tiles of 1 x 128 and of 128 x 1 lie
whole in it, and so the row-wise and the column-wise codes come of the same registers, the latter
transposed on the way out.  Which rows a tile has, the program finds in `offsets`; the grid has as
many tiles as any offsets need, and the programs past the last return.

Division costs more than all else here, and where it branches, registers.  So quotients are made of
a reciprocal and one step of correction (Markstein, IBM J. Res. Dev. 34, 1990), as exact as IEEE's
where the remainder does not underflow; tiles of numbers that small are scaled up beforehand.

Shape legend: R rows sorted by expert, E experts, K columns, P rows padded by expert, N rows of a
weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kern.kernels.fp8_quantize import empty_codes, empty_weights
from r1kern.kernels.fp8_reference import blocks, padded_rows

BLOCK = tl.constexpr(128)
LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(2.0**-126)
INFINITY = tl.constexpr(0x7F800000)
SMALL = tl.constexpr(2.0**-60)
UP = tl.constexpr(2.0**64)
DOWN = tl.constexpr(2.0**-64)

OPTIONS = dict(num_warps=16, num_stages=1)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@triton.jit
def divide(x, divisor, inverse):
    """x / divisor to nearest, where `inverse` is 1 / divisor to nearest."""
    quotient = x * inverse
    # Less than 0, not more, so that the quotient of -0 stays -0; `-x` is 0 - x before Triton 3.9.
    excess = tl.fma(quotient, divisor, x * -1.0)
    return tl.fma(excess * -1.0, inverse, quotient)


@triton.jit
def scales_of(amax, POWER_OF_TWO: tl.constexpr):
    """Largest magnitudes, NaN where there was nothing else -> scales."""
    amax = tl.where(amax == amax, amax, 0.0)
    small = amax < SMALL
    zero = amax * 0.0
    scales = divide(tl.where(small, amax * UP, amax), zero + LARGEST, zero + 1.0 / LARGEST)
    scales = tl.maximum(tl.where(small, scales * DOWN, scales), TINY)
    if POWER_OF_TWO:
        bits = (scales.to(tl.int32, bitcast=True) + 0x7FFFFF) & INFINITY
        scales = bits.to(tl.float32, bitcast=True)
    return tl.where(amax == float("inf"), amax, scales)


@triton.jit
def encode(x, scales, POWER_OF_TWO: tl.constexpr):
    """e4m3 of x / scales, that quotient rounded to float32 first."""
    infinite = scales == float("inf")
    if POWER_OF_TWO:
        inverse = ((254 << 23) - scales.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return (x * tl.where(infinite, 0.0, inverse)).to(tl.float8e4nv)
    up = tl.where(scales < SMALL, UP, 1.0)
    divisor = tl.where(infinite, 1.0, scales * up)
    about = 1.0 / divisor
    inverse = tl.fma(tl.fma(-divisor, about, 1.0 + about * 0.0), about, about)
    inverse = tl.where(infinite, 0.0, inverse)
    x = x * up
    inverse, divisor = tl.broadcast(inverse, x)[0], tl.broadcast(divisor, x)[0]
    return divide(x, divisor, inverse).to(tl.float8e4nv)


@triton.jit
def rows_of(offsets, tile, E, E_PAD: tl.constexpr):
    """First row of a tile, int64, and how many it has: 0 past the last."""
    e = tl.arange(0, E_PAD)
    start = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = (end - start + BLOCK - 1) // BLOCK
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    first = tl.sum(tl.where(mine, start + (tile - before) * BLOCK, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    return first, tl.minimum(last - first, BLOCK).to(tl.int32)


@triton.jit
def write(
    x, first, rows, tile, k, K, P, scale_stride,
    row_codes, row_scales, column_codes, column_scales,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantises x [128, 128], float32, 0 past `rows` and past K: rows first.., columns k.."""
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    size, tile, inside, k = tl.abs(x), tile.to(tl.int64), K - k, k.to(tl.int64)
    if ROWS:
        scales = scales_of(tl.max(size, 1, keep_dims=True), POWER_OF_TWO)
        at = row_codes + first * K + k + (r * K + c)
        tl.store(at, encode(x, scales, POWER_OF_TWO), mask=(r < rows) & (c < inside))
        tl.store(row_scales + k // BLOCK * scale_stride + first + r, scales, mask=r < rows)
    if COLUMNS:
        scales = scales_of(tl.max(size, 0, keep_dims=True), POWER_OF_TWO)
        codes = tl.trans(encode(x, scales, POWER_OF_TWO))
        at = column_codes + k * P + tile * BLOCK + (tl.trans(c) * P + tl.trans(r))
        tl.store(at, codes, mask=tl.trans(c) < inside)
        tl.store(column_scales + tile * K + k + c, scales, mask=c < inside)


@triton.jit
def _quantize_kernel(
    x, offsets, row_codes, row_scales, column_codes, column_scales, K, P, E, scale_stride,
    E_PAD: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile, k = tl.program_id(1), tl.program_id(0) * BLOCK
    first, rows = rows_of(offsets, tile, E, E_PAD)
    if rows == 0:
        return
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (c < K - k)
    value = tl.load(x + first * K + k + (r * K + c), mask=mask, other=0.0).to(tl.float32)
    write(
        value, first, rows, tile, k, K, P, scale_stride,
        row_codes, row_scales, column_codes, column_scales, POWER_OF_TWO, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _weight_kernel(
    weight, codes, codes_t, scales, N, K, part,
    POWER_OF_TWO: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    along, row_block = tl.program_id(0), tl.program_id(1)
    down = (part + BLOCK - 1) // BLOCK
    within, k = row_block % down * BLOCK, (along * BLOCK).to(tl.int64)
    n = (row_block // down * part + within).to(tl.int64)
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (r < part - within) & (c < K - k)
    value = tl.load(weight + n * K + k + (r * K + c), mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(value), 1, keep_dims=True), 0, keep_dims=True)
    scale = scales_of(amax, POWER_OF_TWO)
    code = encode(value, scale, POWER_OF_TWO)
    tl.store(codes + n * K + k + (r * K + c), code, mask=mask)
    if TRANSPOSED:
        at = codes_t + k * N + n + (tl.trans(c) * N + tl.trans(r))
        tl.store(at, tl.trans(code), mask=(tl.trans(r) < part - within) & (tl.trans(c) < K - k))
    one = tl.zeros([1, 1], tl.int32)
    tl.store(scales + row_block * tl.num_programs(0) + along + one, scale)


def grid(R: int, K: int, E: int) -> tuple[int, int]:
    """Programs by columns and by tiles of rows."""
    return blocks(K), padded_rows(R, E) // 128


def quantize(
    x: Tensor, offsets: Tensor, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fp8_quantize.quantize`."""
    x, offsets = x.contiguous(), offsets.contiguous()
    (R, K), E = x.shape, len(offsets) - 1
    codes = empty_codes(R, K, E, x.device, rows, columns)
    if x.numel():
        _quantize_kernel[grid(R, K, E)](
            x, offsets, *codes, K, padded_rows(R, E), E, codes[1].stride(0),
            E_PAD=triton.next_power_of_2(E), POWER_OF_TWO=power_of_two,
            ROWS=rows, COLUMNS=columns, **OPTIONS,
        )  # fmt: skip
    return codes


def quantize_weights(
    weights: list[Tensor], parts: int, power_of_two: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fp8_quantize.quantize_weights`."""
    codes, codes_t, scales = made = empty_weights(weights, parts, transposed)
    _, NB, KB = scales.shape
    for e, weight in enumerate(weights):
        N, K = weight.shape
        if weight.numel():
            _weight_kernel[KB, NB](
                weight.contiguous(), codes[e], codes_t[e] if transposed else codes_t, scales[e],
                N, K, N // parts, POWER_OF_TWO=power_of_two, TRANSPOSED=transposed, **OPTIONS,
            )  # fmt: skip
    return made


SIGNATURE = dict(
    offsets="*i64", row_codes="*fp8e4nv", row_scales="*fp32", column_codes="*fp8e4nv",
    column_scales="*fp32", K="i32", P="i32", E="i32", scale_stride="i32",
)  # fmt: skip


def variants():
    """(name, kernel, signature, constexprs, options, aligned) of what the launchers compile.

    Of narrow sizes (K, N not a multiple of 16) only what is written both ways.
    """
    for dtype in ("fp32", "bf16"):
        for power_of_two in (False, True):
            kind = "pow2" if power_of_two else "fp32"
            for rows, columns, aligned in (
                (True, True, True), (True, True, False), (True, False, True)
            ):  # fmt: skip
                layouts = "both" if columns else "rows"
                yield (
                    f"{layouts} {dtype} {kind} {'' if aligned else 'un'}aligned",
                    _quantize_kernel,
                    dict(x=f"*{dtype}", **SIGNATURE),
                    dict(E_PAD=32, POWER_OF_TWO=power_of_two, ROWS=rows, COLUMNS=columns),
                    OPTIONS,
                    {"x", *SIGNATURE} - ({"E"} if aligned else {"E", "K"}),
                )
            pointers = dict(
                weight=f"*{dtype}", codes="*fp8e4nv", codes_t="*fp8e4nv", scales="*fp32"
            )
            yield (
                f"{dtype} {kind}",
                _weight_kernel,
                {**pointers, "N": "i32", "K": "i32", "part": "i32"},
                dict(POWER_OF_TWO=power_of_two, TRANSPOSED=True),
                OPTIONS,
                {*pointers, "N", "K", "part"},
            )
