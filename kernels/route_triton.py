"""DeepSeek-V3's router on a GPU: scores, selection and the permuted layout in one launch.

Persistent programs, all resident at once, own consecutive runs of tokens.  Phase 1 routes a
program's tokens block by block and leaves its number of tokens per expert in a table.  A barrier of
the whole grid later, phase 2 turns the table into offsets and every token's choices into rows of
the permuted layout.  Nothing but the barrier is atomic, so that all results are deterministic.

Experts lie in a tile of G_PAD * S_PAD columns, both powers of two, group by group: column c is
expert (c // S_PAD) * S + c % S_PAD.  Columns and experts are in the same order.

Shape legend: T tokens, E experts in G groups of S, W columns of the tile, K experts per token,
P programs, R rows of the permuted layout, B tokens of a block.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kern.errors import UserError
from r1kern.kernels.route import capacity

# Keys of selection are a score's bits made monotone; below that of -inf are the key of what is out
# of the choice and, PICKED + j, that of the choice number j.
DROPPED = tl.constexpr(-(2**31))
PICKED = tl.constexpr(-(2**31) + 1)

TILE = 8192  # elements of a forward tile, 16 a thread
GRAD_TILE = 2048
MAX_TOPK = 16
MAX_COLUMNS = 2048
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _wait_for_all(arrived):
    """Barrier of the grid; what any program wrote before it, every program sees after it."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def _pick(key, e, E: tl.constexpr):
    """The greatest key of each row [B, W]: its expert, the lowest of equals [B, 1]."""
    best = tl.max(key, 1, keep_dims=True)
    return tl.min(tl.where(key == best, e, E), 1, keep_dims=True)


@triton.jit
def _keys(choice):
    """int32 in the order of float32 (which is not -0)."""
    bits = choice.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ones(x):
    """Number of bits that are 1 in uint32, as int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _in_best_groups(
    choice, TOPK_GROUPS: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    G_PAD: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """Whether a column [B, W] is of one of the groups with the greatest sum of their best two."""
    grouped = tl.reshape(choice, [B, G_PAD, S_PAD])
    s = tl.arange(0, S_PAD)[None, None, :]
    first = tl.max(grouped, 2, keep_dims=True)
    where = tl.min(tl.where(grouped == first, s, S_PAD), 2, keep_dims=True)
    second = tl.max(tl.where(s == where, float("-inf"), grouped), 2, keep_dims=True)
    g = tl.arange(0, G_PAD)[None, :, None]
    key = tl.where(g < G, _keys(first + second), DROPPED)
    for _ in range(TOPK_GROUPS):
        best = tl.max(key, 1, keep_dims=True)
        picked = tl.min(tl.where(key == best, g, G), 1, keep_dims=True)
        key = tl.where(g == picked, PICKED, key)
    return tl.reshape(tl.broadcast_to(key == PICKED, [B, G_PAD, S_PAD]), [B, G_PAD * S_PAD])


@triton.jit
def _select(
    scores, bias, e, valid, TOPK_GROUPS: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    G: tl.constexpr, B: tl.constexpr, G_PAD: tl.constexpr, S_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):  # fmt: skip
    """The chosen experts [B, K_PAD], best first, and which choice a column [B, W] is, if any: all
    others are below 0 or not below K."""
    choice = tl.where(valid, scores + bias, float("-inf"))
    key = tl.where(valid, _keys(choice), DROPPED)
    if TOPK_GROUPS < G:
        live = _in_best_groups(choice, TOPK_GROUPS, G, B, G_PAD, S_PAD)
        key = tl.where(live, key, DROPPED)
    k = tl.arange(0, K_PAD)[None, :]
    indices = tl.zeros([B, K_PAD], tl.int32)
    for j in range(K):
        best = _pick(key, e, E)
        key = tl.where(e == best, PICKED + j, key)
        indices = tl.where(k == j, best, indices)
    return indices, key - PICKED


@triton.jit
def _route_tokens(
    logits, bias, weights, indices, ranks, tokens, end, seen, sums, scale,
    TOPK_GROUPS: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, E: tl.constexpr,
    G: tl.constexpr, B: tl.constexpr, G_PAD: tl.constexpr, S_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):  # fmt: skip
    """Routes the tokens [B, 1] before `end`: weights, indices, and ranks, the number of the
    program's earlier tokens of the same expert.  Returns `seen` and `sums` [W], tokens and
    score sums of each expert, with these tokens added."""
    W: tl.constexpr = G_PAD * S_PAD
    c = tl.arange(0, W)[None, :]
    e = (c // S_PAD) * (E // G) + c % S_PAD
    valid = (c // S_PAD < G) & (c % S_PAD < E // G)
    row = tokens.to(tl.int64)
    live = tokens < end
    x = tl.load(logits + row * E + e, mask=live & valid, other=0.0).to(tl.float32)
    scores = tl.where(live & valid, tl.sigmoid(x), 0.0)
    total = tl.sum(scores, 1, keep_dims=True)
    sums += tl.sum(scores / tl.where(live, total, 1.0), 0)
    b = tl.load(bias + e, mask=valid, other=0.0).to(tl.float32)
    chosen, j = _select(scores, b, e, valid, TOPK_GROUPS, K, E, G, B, G_PAD, S_PAD, K_PAD)
    picked = live & (j >= 0) & (j < K)
    # The tokens of each expert as bits: a token's rank is how many are set below its own.
    bit = tl.full([B, 1], 1, tl.uint32) << tl.arange(0, B)[:, None].to(tl.uint32)
    bits = tl.sum(tl.where(picked, bit, 0), 0)
    column = tl.reshape(chosen // (E // G) * S_PAD + chosen % (E // G), [B * K_PAD])
    below = tl.reshape(tl.broadcast_to(bit - 1, [B, K_PAD]), [B * K_PAD])
    rank = _ones(tl.gather(bits, column, 0) & below) + tl.gather(seen, column, 0)
    rank = tl.reshape(rank, [B, K_PAD])

    k = tl.arange(0, K_PAD)[None, :]
    mask = live & (k < K)
    # Gathered again rather than taken from `scores`: K loads in cache for K reductions over W.
    raw = tl.load(logits + row * E + chosen, mask=mask, other=0.0).to(tl.float32)
    weight = tl.where(mask, tl.sigmoid(raw), 0.0)
    if NORMALIZE:
        weight /= tl.sum(weight, 1, keep_dims=True) + 1e-20
    tl.store(weights + row * K + k, weight * scale, mask=mask)
    tl.store(indices + row * K + k, chosen.to(tl.int64), mask=mask)
    tl.store(ranks + row * K + k, rank, mask=mask)
    return seen + _ones(bits), sums


@triton.jit
def _table_sums(
    table, program, programs, e, valid, E: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr
):
    """Sums [W] of the columns of table [P, E]: over the programs before this one, and over all."""
    before = tl.zeros([W], table.dtype.element_ty)
    total = tl.zeros([W], table.dtype.element_ty)
    for first in range(0, programs, ROWS):
        p = first + tl.arange(0, ROWS)[:, None]
        # Past the first-level cache, which is not coherent.
        mask = (p < programs) & valid[None, :]
        part = tl.load(table + p * E + e[None, :], mask=mask, other=0, cache_modifier=".cg")
        before += tl.sum(tl.where(p < program, part, 0), 0)
        total += tl.sum(part, 0)
    return before, total


@triton.jit(do_not_specialize=["T", "R", "align"])
def _route_kernel(
    logits, bias, weights, indices, counts, offsets, slots, order, score_sums,
    count_table, sum_table, arrived, T, R, align, scale,
    TOPK_GROUPS: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, E: tl.constexpr,
    G: tl.constexpr, B: tl.constexpr, G_PAD: tl.constexpr, S_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = G_PAD * S_PAD
    N: tl.constexpr = 1024
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, W)
    e = (c // S_PAD) * (E // G) + c % S_PAD
    valid = (c // S_PAD < G) & (c % S_PAD < E // G)
    share = tl.cdiv(T, programs)
    start = tl.minimum(program * share, T)
    end = tl.minimum(start + share, T)

    seen = tl.zeros([W], tl.int32)
    sums = tl.zeros([W], tl.float32)
    for first in range(start, end, B):
        tokens = first + tl.arange(0, B)[:, None]
        seen, sums = _route_tokens(
            logits, bias, weights, indices, slots, tokens, end, seen, sums, scale,
            TOPK_GROUPS, K, NORMALIZE, E, G, B, G_PAD, S_PAD, K_PAD,
        )  # fmt: skip
    tl.store(count_table + program * E + e, seen, mask=valid)
    tl.store(sum_table + program * E + e, sums, mask=valid)
    if R > T * K:
        for first in range(program * N, R, programs * N):
            r = first + tl.arange(0, N)
            tl.store(order + r, tl.full([N], -1, tl.int32), mask=r < R)

    _wait_for_all(arrived)

    before, total = _table_sums(count_table, program, programs, e, valid, E, B, W)
    padded = (total + align - 1) // align * align
    offset = tl.cumsum(padded, 0) - padded
    if program == 0:
        tl.store(counts + e, total.to(tl.int64), mask=valid)
        tl.store(offsets + e, offset.to(tl.int64), mask=valid)
        tl.store(offsets + E, tl.sum(padded, 0).to(tl.int64))
    if program == programs - 1:
        _, score_sum = _table_sums(sum_table, program, programs, e, valid, E, B, W)
        tl.store(score_sums + e, score_sum, mask=valid)
    base = offset + before
    for first in range(start * K, end * K, N):
        i = first + tl.arange(0, N)
        mask = i < end * K
        expert = tl.load(indices + i, mask=mask, other=0, cache_modifier=".cg").to(tl.int32)
        rank = tl.load(slots + i, mask=mask, other=0, cache_modifier=".cg")
        slot = rank + tl.gather(base, expert // (E // G) * S_PAD + expert % (E // G), 0)
        tl.store(slots + i, slot, mask=mask)
        tl.store(order + slot, i, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _route_backward_kernel(
    logits, indices, grad_weights, grad_score_sums, grad_logits, T, scale,
    K: tl.constexpr, NORMALIZE: tl.constexpr, WITH_WEIGHTS: tl.constexpr,
    WITH_SUMS: tl.constexpr, E: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
    K_PAD: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * B + tl.arange(0, B)[:, None]
    live = tokens < T
    row = tokens.to(tl.int64)
    e = tl.arange(0, W)[None, :]
    grad = tl.zeros([B, W], tl.float32)
    if WITH_SUMS:
        x = tl.load(logits + row * E + e, mask=live & (e < E), other=0.0).to(tl.float32)
        s = tl.where(live & (e < E), tl.sigmoid(x), 0.0)
        total = tl.where(live, tl.sum(s, 1, keep_dims=True), 1.0)
        g = tl.load(grad_score_sums + e, mask=e < E, other=0.0)
        grad = (g - tl.sum(g * s, 1, keep_dims=True) / total) / total * s * (1 - s)
    if WITH_WEIGHTS:
        k = tl.arange(0, K_PAD)[None, :]
        mask = live & (k < K)
        chosen = tl.load(indices + row * K + k, mask=mask, other=0)
        x = tl.load(logits + row * E + chosen, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(mask, tl.sigmoid(x), 0.0)
        g = tl.load(grad_weights + row * K + k, mask=mask, other=0.0) * scale
        if NORMALIZE:
            total = tl.sum(s, 1, keep_dims=True) + 1e-20
            g = (g - tl.sum(g * s, 1, keep_dims=True) / total) / total
        g = g * s * (1 - s)
        for j in range(K):
            # Column j of both, as [B, 1]: exact, all other terms being 0.
            expert = tl.sum(tl.where(k == j, chosen.to(tl.int32), 0), 1, keep_dims=True)
            d = tl.sum(tl.where(k == j, g, 0.0), 1, keep_dims=True)
            grad += tl.where(e == expert, d, 0.0)
    out = grad.to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + row * E + e, out, mask=live & (e < E))


def route(
    logits: Tensor,
    bias: Tensor,
    num_groups: int,
    topk_groups: int,
    topk: int,
    scale: float,
    normalize: bool,
    align: int,
    programs: int | None = None,
) -> tuple[Tensor, ...]:
    """DeepSeek-V3's router (arXiv 2412.19437, equations 12-16); `r1kern.ops.route` documents it.

    Args:
        logits: float32, bfloat16 or float16 [T, E]; scores are computed in float32.
        bias: floating [E].
        programs: size of the grid (default: the device's multiprocessors, all resident at once).

    Returns:
        weights float32 [T, K], indices int64 [T, K], counts int64 [E], offsets int64 [E + 1],
        slots int32 [T, K], order int32 [R], score_sums float32 [E].

    Raises:
        UserError: a dtype or a size that these kernels do not take.
    """
    T, E = logits.shape
    tile = _tile(E, num_groups, topk_groups, topk, normalize)
    R = capacity(T, topk, E, align)
    if logits.dtype not in DTYPES:
        raise UserError(f"a GPU routes float32, bfloat16 or float16 logits, got {logits.dtype}")
    if R >= 2**31:
        raise UserError(f"{T} tokens of {topk} experts exceed int32 rows: route fewer at a time")
    if programs is None:
        programs = torch.cuda.get_device_properties(logits.device).multi_processor_count
    programs = max(1, min(programs, triton.cdiv(T, tile["B"])))

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    weights, indices = empty(T, topk, dtype=torch.float32), empty(T, topk, dtype=torch.int64)
    counts, offsets = empty(E, dtype=torch.int64), empty(E + 1, dtype=torch.int64)
    slots, order, score_sums = empty(T, topk), empty(R), empty(E, dtype=torch.float32)
    count_table, sum_table = empty(programs, E), empty(programs, E, dtype=torch.float32)
    arrived = torch.zeros(1, dtype=torch.int32, device=logits.device)
    _route_kernel[(programs,)](
        logits.contiguous(), bias.contiguous(), weights, indices, counts, offsets, slots, order,
        score_sums, count_table, sum_table, arrived, T, R, align, scale, **tile,
        num_warps=_warps(tile), launch_cooperative_grid=True,
    )  # fmt: skip
    return weights, indices, counts, offsets, slots, order, score_sums


def route_backward(
    logits: Tensor,
    indices: Tensor,
    grad_weights: Tensor | None,
    grad_score_sums: Tensor | None,
    scale: float,
    normalize: bool,
) -> Tensor:
    """Gradient of `route` by its logits: [T, E] in their dtype, computed in float32.

    Args:
        indices: int64 [T, K] of `route`.
        grad_weights: float32 [T, K]; without it the weights have no gradient.
        grad_score_sums: float32 [E]; without it only the K chosen logits of a token are read.
    """
    logits = logits.contiguous()
    T, E = logits.shape
    grad_logits = torch.empty_like(logits)
    tile = _grad_tile(E, indices.shape[1], normalize, grad_weights, grad_score_sums)
    if T:
        _route_backward_kernel[(triton.cdiv(T, tile["B"]),)](
            logits, indices.contiguous(),
            indices if grad_weights is None else grad_weights.contiguous(),
            indices if grad_score_sums is None else grad_score_sums.contiguous(),
            grad_logits, T, scale, **tile, num_warps=4,
        )  # fmt: skip
    return grad_logits


def _tile(E: int, G: int, topk_groups: int, topk: int, normalize: bool) -> dict:
    """The compile-time arguments of `_route_kernel`."""
    G_PAD, S_PAD = triton.next_power_of_2(G), triton.next_power_of_2(E // G)
    if G_PAD * S_PAD > MAX_COLUMNS or topk > MAX_TOPK:
        raise UserError(
            f"a GPU routes up to {MAX_COLUMNS} experts, topk up to {MAX_TOPK}: got {E} and {topk}"
        )
    return dict(
        TOPK_GROUPS=topk_groups, K=topk, NORMALIZE=normalize, E=E, G=G,
        B=max(1, min(32, TILE // (G_PAD * S_PAD)) // (2 if topk > 8 else 1)), G_PAD=G_PAD,
        S_PAD=S_PAD, K_PAD=triton.next_power_of_2(topk),
    )  # fmt: skip


def _warps(tile: dict) -> int:
    return max(2, tile["B"] * tile["G_PAD"] * tile["S_PAD"] // 512)


def _grad_tile(E: int, K: int, normalize: bool, grad_weights, grad_score_sums) -> dict:
    """The compile-time arguments of `_route_backward_kernel`."""
    W = triton.next_power_of_2(E)
    return dict(
        K=K, NORMALIZE=normalize, WITH_WEIGHTS=grad_weights is not None,
        WITH_SUMS=grad_score_sums is not None, E=E, B=max(1, min(64, GRAD_TILE // W)), W=W,
        K_PAD=triton.next_power_of_2(K),
    )  # fmt: skip


def variants():
    """(name, kernel, signature, constexprs, options, aligned) at published and awkward shapes; of
    float16 nothing, whose instructions are bfloat16's but for their type."""
    shapes = [(256, 8, 4, 8), (160, 8, 3, 6), (384, 1, 1, 8), (128, 1, 1, 16), (12, 3, 2, 4)]
    outputs = dict(weights="*fp32", indices="*i64", counts="*i64", offsets="*i64", slots="*i32",
                   order="*i32", score_sums="*fp32", count_table="*i32", sum_table="*fp32",
                   arrived="*i32")  # fmt: skip
    for (E, G, topk_groups, K), x in itertools.product(shapes, ("fp32", "bf16")):
        name = f"{E}x{K}_{G}groups_{x}"
        pointers = dict(logits=f"*{x}", bias="*fp32", **outputs)
        signature = {**pointers, "T": "i32", "R": "i32", "align": "i32", "scale": "fp32"}
        tile = _tile(E, G, topk_groups, K, True)
        options = dict(num_warps=_warps(tile), num_stages=3)
        yield f"route_{name}", _route_kernel, signature, tile, options, set(pointers)
        for sums in (None, True):
            pointers = dict(logits=f"*{x}", indices="*i64", grad_weights="*fp32",
                            grad_score_sums="*fp32" if sums else "*i64",
                            grad_logits=f"*{x}")  # fmt: skip
            signature = {**pointers, "T": "i32", "scale": "fp32"}
            tile, options = _grad_tile(E, K, True, True, sums), dict(num_warps=4, num_stages=3)
            called = f"route_backward_{name}{'_sums' if sums else ''}"
            yield called, _route_backward_kernel, signature, tile, options, set(pointers)
