"""Rows of tokens into the permuted layout and back: one read of a token, K writes, and the reverse.

Memory-bound: a program moves one block of columns of one token, 16 bytes a thread at a time.

Shape legend: T tokens, H hidden, K experts per token, R rows of the permuted layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kern.errors import UserError

GRAD_COLUMNS = 512
OPTIONS = dict(num_warps=4, num_stages=3)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _permute_kernel(x, slots, rows, H, K: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(x + token * H + h, mask=h < H, other=0.0)
    for k in tl.static_range(K):
        slot = tl.load(slots + token * K + k).to(tl.int64)
        tl.store(rows + slot * H + h, value, mask=h < H)


@triton.jit
def _unpermute_kernel(
    rows, slots, weights, out, H, K: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slots + token * K + k).to(tl.int64)
        row = tl.load(rows + slot * H + h, mask=h < H, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights + token * K + k)
        total += row
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def _unpermute_backward_kernel(
    grad, rows, slots, weights, grad_rows, grad_weights, H,
    K: tl.constexpr, K_PAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_PAD)
    slot = tl.load(slots + token * K + k, mask=k < K, other=0).to(tl.int64)[:, None]
    weight = tl.load(weights + token * K + k, mask=k < K, other=0.0)[:, None]
    products = tl.zeros([K_PAD, COLUMNS], tl.float32)
    for first in range(0, H, COLUMNS):
        h = first + tl.arange(0, COLUMNS)[None, :]
        mask = (k[:, None] < K) & (h < H)
        g = tl.load(grad + token * H + h, mask=h < H, other=0.0).to(tl.float32)
        row = tl.load(rows + slot * H + h, mask=mask, other=0.0).to(tl.float32)
        products += g * row
        out = (g * weight).to(grad_rows.dtype.element_ty)
        tl.store(grad_rows + slot * H + h, out, mask=mask)
    tl.store(grad_weights + token * K + k, tl.sum(products, 1), mask=k < K)


def permute(x: Tensor, slots: Tensor, R: int) -> Tensor:
    """[T, H], int32 [T, K] -> [R, H]: row slots[t, k] is token t; rows of no token are 0."""
    x, slots = x.contiguous(), slots.contiguous()
    T, H = x.shape
    rows = _rows(R, slots, x)
    if slots.numel() and H:
        columns = _columns(H)
        _permute_kernel[(T, triton.cdiv(H, columns))](
            x, slots, rows, H, K=slots.shape[1], COLUMNS=columns, **OPTIONS
        )
    return rows


def unpermute(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """[R, H], int32 [T, K], float32 [T, K] -> [T, H]: sum_k weights[t, k] * rows[slots[t, k]].

    In float32, k ascending; without weights they are 1.
    """
    _summable(rows)
    rows, slots = rows.contiguous(), slots.contiguous()
    T, K = slots.shape
    H = rows.shape[1]
    out = rows.new_empty(T, H)
    if out.numel():
        columns = _columns(H)
        _unpermute_kernel[(T, triton.cdiv(H, columns))](
            rows, slots, rows if weights is None else weights.contiguous(), out, H,
            K=K, WEIGHTED=weights is not None, COLUMNS=columns, **OPTIONS,
        )  # fmt: skip
    return out


def unpermute_backward(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted `unpermute`, in one pass over the rows.

    [T, H], [R, H], int32 [T, K], float32 [T, K] -> [R, H] in the dtype of `rows` (0 where no token
    is) and float32 [T, K].
    """
    _summable(rows)
    grad, rows, slots = grad.contiguous(), rows.contiguous(), slots.contiguous()
    T, K = slots.shape
    R, H = rows.shape
    grad_rows = _rows(R, slots, rows)
    grad_weights = torch.empty(T, K, dtype=torch.float32, device=rows.device)
    if slots.numel():
        _unpermute_backward_kernel[(T,)](
            grad, rows, slots, weights.contiguous(), grad_rows, grad_weights, H,
            K=K, K_PAD=triton.next_power_of_2(K), COLUMNS=GRAD_COLUMNS, **OPTIONS,
        )  # fmt: skip
    return grad_rows, grad_weights


def _summable(rows: Tensor) -> None:
    if rows.dtype not in DTYPES:
        raise UserError(f"rows must be float32, bfloat16 or float16 on a GPU, got {rows.dtype}")


def _columns(H: int) -> int:
    """Columns of a block of `permute` and `unpermute`: rows not aligned to 16 bytes are moved one
    element at a time."""
    return 1024 if H % 16 == 0 else 256


def _rows(R: int, slots: Tensor, like: Tensor) -> Tensor:
    """[R, H] for a kernel that writes the rows that a token has."""
    allocate = like.new_empty if slots.numel() == R else like.new_zeros
    return allocate(R, like.shape[1])


def variants():
    """(name, kernel, signature, constexprs, options, aligned) of what the launchers compile.

    Of float16 nothing: its instructions are bfloat16's but for their type.
    """
    for dtype in ("fp32", "bf16"):
        x, slots, weights = f"*{dtype}", "*i32", "*fp32"
        calls = {
            "permute": (_permute_kernel, dict(x=x, slots=slots, rows=x), {}),
            "unpermute": (
                _unpermute_kernel,
                dict(rows=x, slots=slots, weights=weights, out=x),
                dict(WEIGHTED=True),
            ),
            "unpermute_sum": (
                _unpermute_kernel,
                dict(rows=x, slots=slots, weights=x, out=x),
                dict(WEIGHTED=False),
            ),
            "unpermute_backward": (
                _unpermute_backward_kernel,
                dict(grad=x, rows=x, slots=slots, weights=weights, grad_rows=x,
                     grad_weights=weights),
                {},
            ),
        }  # fmt: skip
        for call, (kernel, pointers, constants) in calls.items():
            backward = kernel is _unpermute_backward_kernel
            for K in (1, 8, 16):
                constexprs = {**constants, "K": K}
                if backward:
                    constexprs["K_PAD"] = triton.next_power_of_2(K)
                for H in (7168, 7169):  # rows aligned, or not
                    constexprs["COLUMNS"] = GRAD_COLUMNS if backward else _columns(H)
                    aligned = set(pointers) | ({"H"} if H % 16 == 0 else set())
                    name = f"{call}_{dtype}_x{K}_{'' if 'H' in aligned else 'un'}aligned"
                    signature = {**pointers, "H": "i32"}
                    yield name, kernel, signature, dict(constexprs), OPTIONS, aligned
