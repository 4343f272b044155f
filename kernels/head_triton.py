"""The LM head on CUDA: logits with their softmax statistics in one GEMM, and the logits' gradient.

Shape legend: n rows of a chunk, m rows kept of it, H hidden, V this rank's vocabulary rows,
BM, BV, BK rows, vocabulary and hidden of a tile, BT tiles and BR, BC rows and columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r1kern.errors import UserError


class Tile(NamedTuple):
    BM: int
    BV: int
    BK: int
    num_warps: int
    num_stages: int


TILES = {
    "wide": Tile(128, 256, 64, num_warps=8, num_stages=4),
    "square": Tile(128, 128, 64, num_warps=8, num_stages=3),
    "thin": Tile(64, 128, 64, num_warps=4, num_stages=4),
    "exact": Tile(32, 64, 32, num_warps=4, num_stages=2),
}
COMBINE = dict(BT=128, BR=16)
COMBINE_OPTIONS = dict(num_warps=4, enable_fp_fusion=True)
DLOGITS = dict(BR=64, BC=64)
DLOGITS_OPTIONS = dict(num_warps=8, enable_fp_fusion=True)
SPAN = 512
"""Rows a program of `_dlogits` walks over when the rows do not move."""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FAR = tl.constexpr(-1e30)
"""Stands for minus infinity: exp(FAR - x) and exp(FAR - x) * (FAR - x) are 0, not NaN."""


def tile_for(n: int, V: int, dtype: torch.dtype) -> str:
    """Name of the tile for [n, H] x [V, H].

    `exact` is float32's, which has no tensor cores.  `wide` needs two waves of an H200's 132 SMs,
    each of which holds one such tile, and a V of which logits are stored by vectors: by elements
    it spills.
    """
    if dtype == torch.float32:
        return "exact"
    if n <= TILES["thin"].BM:
        return "thin"
    wide = TILES["wide"]
    tiles = triton.cdiv(n, wide.BM) * triton.cdiv(V, wide.BV)
    return "wide" if tiles >= 2 * 132 and V % 16 == 0 else "square"


def logits_stats(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    inv_temperature: float,
    logits: Tensor | None = None,
) -> Tensor:
    """Softmax statistics of z = inv_temperature * hidden @ weight.T, accumulated in float32.

    [n, H], [V, H] of one dtype (bf16, fp16, fp32), int64 [n] -> float32 [4, n]: max_j z,
    sum_j exp(z - max), sum_j exp(z - max)(z - max), and z at `columns` (0 where that is -1).
    `logits` [n, V] of the same dtype, where given, receives z.  Deterministic.

    Raises:
        UserError: another dtype, or rows that TMA cannot address (H % 8 != 0 in bf16).
    """
    if hidden.dtype not in TYPES:
        raise UserError(f"the CUDA head takes {', '.join(TYPES.values())}, not {hidden.dtype}")
    n, H = hidden.shape
    V = len(weight)
    stats = hidden.new_empty((4, n), dtype=torch.float32)
    if n == 0:
        return stats
    tile = TILES[tile_for(n, V, hidden.dtype)]
    tiles = triton.cdiv(V, tile.BV)
    partial = hidden.new_empty((tiles, 4, n), dtype=torch.float32)
    _head[(triton.cdiv(n, tile.BM) * tiles,)](
        _descriptor("hidden", hidden, tile.BM, tile.BK),
        _descriptor("weight", weight, tile.BV, tile.BK),
        columns.contiguous(),
        logits,
        partial,
        inv_temperature,
        n,
        V,
        H,
        0 if logits is None else logits.stride(0),
        **_constants(tile, hidden.dtype),
        **_options(tile),
    )
    _combine[(triton.cdiv(n, COMBINE["BR"]),)](
        partial, stats, tiles, n, **COMBINE, **COMBINE_OPTIONS
    )
    return stats


def dlogits_(
    logits: Tensor,
    live: Tensor | None,
    columns: Tensor,
    shift: Tensor,
    c0: Tensor,
    c1: Tensor,
    g: Tensor,
) -> None:
    """The gradient with respect to z, in place of z; rows not in `live` are squeezed out.

    With r = live[i], ascending, or r = i where `live` is None, row i becomes
    dz_j = exp(z_j - lse_r) (c0_r + c1_r (z_j - lse_r)) + g_r [j = columns_r], z row r as it was.

    logits [n, V], live int64 [m], columns int64 [n], shift, c0, c1, g float32 [n].  Rows of
    `logits` from m on are left as they are, or as the squeeze left them.
    """
    assert logits.stride(1) == 1, logits.stride()
    n, V = logits.shape
    m = n if live is None else len(live)
    # Rows that move have to be walked over by one program, from the first on.
    span = SPAN if live is None else max(m, 1)
    _dlogits[(triton.cdiv(V, DLOGITS["BC"]), triton.cdiv(m, span))](
        logits,
        None if live is None else live.contiguous(),
        *(x.contiguous() for x in (columns, shift, c0, c1, g)),
        m,
        span,
        V,
        logits.stride(0),
        **DLOGITS,
        **DLOGITS_OPTIONS,
    )


def variants() -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict, set]]:
    """Everything that can be launched: name, kernel, signature, constants, options, and the
    arguments divisible by 16 (without V and stride in `ragged` ones).

    Of float16 one a tile or kernel: its instructions are bfloat16's but for their type.
    """
    for name in TILES:
        for dtype in TYPES:
            if (name == "exact") == (dtype == torch.float32):
                yield from _head_variants(name, dtype)
    signature = dict(partial="*fp32", stats="*fp32", tiles="i32", n="i32")
    yield "float32", _combine, signature, COMBINE, COMBINE_OPTIONS, {"partial", "stats"}
    for ty in TYPES.values():
        yield from _dlogits_variants(ty)


def _head_variants(name: str, dtype: torch.dtype) -> Iterator[tuple]:
    tile, ty = TILES[name], TYPES[dtype]
    sizes = dict(n="i32", V="i32", H="i32", stride="i32")
    ragged = (" stored ragged",) if name != "wide" else ()
    for kept in (" stored",) if ty == "fp16" else ("", " stored", *ragged):
        signature = {
            "hidden": f"tensordesc<{ty}[{tile.BM},{tile.BK}]>",
            "weight": f"tensordesc<{ty}[{tile.BV},{tile.BK}]>",
            **dict(columns="*i64", partial="*fp32", inv_temperature="fp32"),
            **({"logits": f"*{ty}"} if kept else {}),
            **sizes,
        }
        constants = _constants(tile, dtype) | ({} if kept else {"logits": None})
        aligned = {"logits", "partial", "H"} | (set() if "ragged" in kept else {"V", "stride"})
        yield f"{name} {ty}{kept}", _head, signature, constants, _options(tile), aligned


def _dlogits_variants(ty: str) -> Iterator[tuple]:
    rows = dict.fromkeys(("shift", "c0", "c1", "g"), "*fp32")
    sizes = dict(m="i32", span="i32", V="i32", stride="i32")
    for move in ("moved",) if ty == "fp16" else ("in place", "moved"):
        for ragged in ("",) if ty == "fp16" else ("", " ragged"):
            signature = {"logits": f"*{ty}", "columns": "*i64", **rows, **sizes}
            signature |= {"live": "*i64"} if move == "moved" else {}
            constants = DLOGITS | ({} if move == "moved" else {"live": None})
            aligned = {"logits"} if ragged else {"logits", "V", "stride"}
            name = f"{ty} {move}{ragged}"
            yield name, _dlogits, signature, constants, DLOGITS_OPTIONS, aligned


def _constants(tile: Tile, dtype: torch.dtype) -> dict:
    precision = "ieee" if dtype == torch.float32 else "tf32"  # of no effect but in float32
    return dict(BM=tile.BM, BV=tile.BV, BK=tile.BK, PRECISION=precision)


def _options(tile: Tile) -> dict:
    return dict(num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)


def _descriptor(name: str, x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    pitch = x.stride(0) * x.itemsize
    if x.stride(1) != 1 or pitch % 16 or x.data_ptr() % 16:
        raise UserError(
            f"{name} needs contiguous rows at multiples of 16 bytes: strides are {x.stride()} "
            f"in {TYPES[x.dtype]}; take H divisible by {16 // x.itemsize}"
        )
    return TensorDescriptor.from_tensor(x, [rows, cols])


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["columns"])
def _head(
    hidden, weight, columns, logits, partial, inv_temperature, n, V, H, stride,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Up to 16 tiles of rows share a tile of the weight while it is in L2, which hidden stays in.
    group: tl.constexpr = 16
    tiles = tl.cdiv(V, BV)
    first = tl.program_id(0) // (group * tiles) * group
    height = tl.minimum(tl.cdiv(n, BM) - first, group)
    within = tl.program_id(0) % (group * tiles)
    m0 = (first + within % height) * BM
    tile = within // height
    v0 = tile * BV

    z = tl.zeros((BM, BV), tl.float32)
    for k in range(0, H, BK):
        z = tl.dot(hidden.load([m0, k]), weight.load([v0, k]).T, z, input_precision=PRECISION)
    z *= inv_temperature

    # Half a tile at a time, and the logits last: any other order needs more registers than are.
    half: tl.constexpr = BV // 2
    left, right = tl.split(tl.permute(tl.reshape(z, (BM, 2, half)), (0, 2, 1)))
    rows = m0 + tl.arange(0, BM)
    cols = v0 + tl.arange(0, half)
    target = tl.load(columns + rows, mask=rows < n, other=-1).to(tl.int32)
    left = tl.where((cols < V)[None, :], left, FAR)
    right = tl.where((cols + half < V)[None, :], right, FAR)
    peak = tl.maximum(tl.max(left, 1), tl.max(right, 1))
    total, moment, found = _sums(left, peak, cols, target)
    total2, moment2, found2 = _sums(right, peak, cols + half, target)
    at = partial + tile.to(tl.int64) * 4 * n + rows
    tl.store(at, peak, mask=rows < n)
    tl.store(at + n, total + total2, mask=rows < n)
    tl.store(at + 2 * n, moment + moment2, mask=rows < n)
    tl.store(at + 3 * n, found + found2, mask=rows < n)
    if logits is not None:
        _store(logits, left, rows, cols, n, V, stride)
        _store(logits, right, rows, cols + half, n, V, stride)


@triton.jit
def _sums(z, peak, cols, target):
    shifted = z - peak[:, None]
    e = tl.exp(shifted)
    found = tl.where(cols[None, :] == target[:, None], z, 0)
    return tl.sum(e, 1), tl.sum(e * shifted, 1), tl.sum(found, 1)


@triton.jit
def _store(logits, z, rows, cols, n, V, stride):
    at = logits + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, z.to(logits.dtype.element_ty), mask=(rows < n)[:, None] & (cols < V)[None, :])


@triton.jit(do_not_specialize=["tiles", "n"])
def _combine(partial, stats, tiles, n, BT: tl.constexpr, BR: tl.constexpr):
    """Sums about each tile's own maximum, moved to the maximum of all tiles."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    peaks = tl.full((BT, BR), FAR, tl.float32)
    for first in range(0, tiles, BT):
        at, there = _partial(partial, first, tiles, rows, n, BT)
        peaks = tl.maximum(peaks, tl.load(at, mask=there, other=FAR))
    peak = tl.max(peaks, 0)
    total = tl.zeros((BR,), tl.float32)
    moment = tl.zeros((BR,), tl.float32)
    found = tl.zeros((BR,), tl.float32)
    for first in range(0, tiles, BT):
        at, there = _partial(partial, first, tiles, rows, n, BT)
        shift = tl.load(at, mask=there, other=FAR) - peak[None, :]
        scale = tl.exp(shift)
        part = tl.load(at + n, mask=there, other=0)
        total += tl.sum(part * scale, 0)
        moment += tl.sum((tl.load(at + 2 * n, mask=there, other=0) + shift * part) * scale, 0)
        found += tl.sum(tl.load(at + 3 * n, mask=there, other=0), 0)
    tl.store(stats + rows, peak, mask=rows < n)
    tl.store(stats + n + rows, total, mask=rows < n)
    tl.store(stats + 2 * n + rows, moment, mask=rows < n)
    tl.store(stats + 3 * n + rows, found, mask=rows < n)


@triton.jit
def _partial(partial, first, tiles, rows, n, BT: tl.constexpr):
    tile = first + tl.arange(0, BT)
    at = partial + tile.to(tl.int64)[:, None] * 4 * n + rows[None, :]
    return at, (tile < tiles)[:, None] & (rows < n)[None, :]


@triton.jit(
    do_not_specialize=["m", "span"],
    do_not_specialize_on_alignment=["live", "columns", "shift", "c0", "c1", "g"],
)
def _dlogits(
    logits, live, columns, shift, c0, c1, g, m, span, V, stride,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, m)
    rows, z = _read(logits, live, first, last, cols, V, stride, BR)
    for i in range(first, last, BR):
        to = i + tl.arange(0, BR)
        kept = to < last
        shifted = z - tl.load(shift + rows, mask=kept, other=0)[:, None]
        a = tl.load(c0 + rows, mask=kept, other=0)[:, None]
        b = tl.load(c1 + rows, mask=kept, other=0)[:, None]
        at_target = tl.load(g + rows, mask=kept, other=0)[:, None]
        target = tl.load(columns + rows, mask=kept, other=-1).to(tl.int32)[:, None]
        dz = tl.exp(shifted) * (a + b * shifted)
        dz += tl.where(cols[None, :] == target, at_target, 0)
        rows, z = _read(logits, live, i + BR, last, cols, V, stride, BR)
        if live is not None:
            # Row r moves to i <= r.  No thread writes block i before every thread has read it and
            # the one after it; what is read later lies above all that is written here.
            tl.debug_barrier()
        at = logits + to.to(tl.int64)[:, None] * stride + cols[None, :]
        tl.store(at, dz.to(logits.dtype.element_ty), mask=kept[:, None] & (cols < V)[None, :])


@triton.jit
def _read(logits, live, i, last, cols, V, stride, BR: tl.constexpr):
    rows = (i + tl.arange(0, BR)).to(tl.int64)
    kept = rows < last
    if live is not None:
        rows = tl.load(live + rows, mask=kept, other=0)
    at = logits + rows[:, None] * stride + cols[None, :]
    z = tl.load(at, mask=kept[:, None] & (cols < V)[None, :], other=0)
    return rows, z.to(tl.float32)
