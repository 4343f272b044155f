"""Grouped matrix products of blockwise FP8 on CUDA: forward and dgrad, and wgrad.

A program walks over tiles of the result and finds each tile's expert itself, from the offsets: the
host never learns the groups' sizes and the grid does not depend on them.  A tile starts at its
expert's first row; rows past its last are computed and not stored.  Sums of 128 are promoted to
float32 by hand, where the scales come in (arXiv 2412.19437, section 3.3.2).

Shape legend: that of `fp8_reference`; B rows and columns of a tile, 128; BE, E rounded up to a
power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r1kern.kernels.fp8_reference import BLOCK

CONSTANTS = dict(B=BLOCK, TALL=16)
"""TALL: tiles of rows that share a tile of columns while it is in L2."""

STAGES = {"hopper": 4, "small": 2}
"""Depth of the pipeline: 128 KB of shared memory (Hopper and data centre Blackwell have 227), or 64
(other GPUs with FP8 have 99)."""

OPTIONS = dict(num_warps=8, enable_fp_fusion=True)
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def grouped_gemm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, out: Tensor
) -> None:
    """out[r] = a[r] @ b[e].T for the rows r of expert e; N and K are multiples of 128.

    e4m3 [R, K], float32 [KB, R], e4m3 [E, N, K], float32 [E, NB, KB] (any strides), int64 [E + 1],
    float32 or bfloat16 [R, N].  Deterministic.
    """
    E, N, K = b.shape
    programs, stages = _machine(a.device)
    _gemm[(programs,)](
        _descriptor(a), _descriptor(b.view(E * N, K)), a_scales, b_scales, offsets, out,
        N, K, E, a_scales.stride(0), *b_scales.stride(),
        BE=triton.next_power_of_2(E), num_stages=stages, **CONSTANTS, **OPTIONS,
    )  # fmt: skip


def grouped_wgrad(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    grads: Tensor,
    N: int,
    K: int,
) -> None:
    """grads[e] += a @ b.T over the rows of expert e; N and K are multiples of 128.

    e4m3 [N, P], float32 [P / 128, N], e4m3 [K, P], float32 [P / 128, K], int64 [E + 1], and int64
    [E], addresses of contiguous float32 [N, K] at multiples of 16 bytes.  Deterministic; blocks
    past the last expert's are not read, an empty expert's gradient is not touched.
    """
    E = len(grads)
    programs, stages = _machine(a.device)
    _wgrad[(programs,)](
        _descriptor(a), _descriptor(b), a_scales, b_scales, offsets, grads, N, K, E,
        BE=triton.next_power_of_2(E), num_stages=stages, **CONSTANTS, **OPTIONS,
    )  # fmt: skip


def variants() -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict, set]]:
    """Everything that can be launched: name, kernel, signature, constants, options, and the
    arguments divisible by 16.  One number of experts stands for all, and strides of 1 for any."""
    descriptor = f"tensordesc<fp8e4nv[{BLOCK},{BLOCK}]>"
    operands = dict(a=descriptor, b=descriptor, a_scales="*fp32", b_scales="*fp32", offsets="*i64")
    strides = dict.fromkeys(("line", "per_expert", "per_row", "per_column"), "i32")
    sizes = dict.fromkeys(("N", "K", "E"), "i32")
    aligned = {"a_scales", "b_scales", "offsets", "out", "grads", "N", "K"}
    constants = {"BE": 32, **CONSTANTS}
    for name, stages in STAGES.items():
        options = OPTIONS | {"num_stages": stages}
        for ty in TYPES.values():
            signature = {**operands, "out": f"*{ty}", **sizes, **strides}
            yield f"{name} {ty}", _gemm, signature, constants, options, aligned
        signature = {**operands, "grads": "*i64", **sizes}
        yield f"{name} fp32", _wgrad, signature, constants, options, aligned


def _machine(device: torch.device) -> tuple[int, int]:
    """Programs that run at once, and the depth of pipeline that fits."""
    if device.type == "cpu":  # Triton's interpreter
        return 3, STAGES["hopper"]
    properties = torch.cuda.get_device_properties(device)
    large = properties.shared_memory_per_block_optin >= 200 << 10
    return properties.multi_processor_count, STAGES["hopper" if large else "small"]


def _descriptor(codes: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(codes, [BLOCK, BLOCK])


@triton.jit(do_not_specialize=["E", "line", "per_expert", "per_row", "per_column"])
def _gemm(
    a, b, a_scales, b_scales, offsets, out, N, K, E, line, per_expert, per_row, per_column,
    B: tl.constexpr, BE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    last = tl.cumsum(_blocks(offsets, E, B, BE), 0)
    rows, columns = tl.max(last, 0), N // B
    for tile in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        i, j = _place(tile, rows, columns, TALL)
        before = last <= i
        e = tl.sum(before.to(tl.int32), 0)
        m = tl.load(offsets + e) + (i - tl.max(tl.where(before, last, 0), 0)) * B
        r = m + tl.arange(0, B)
        kept = r < tl.load(offsets + e + 1)

        at_a = a_scales + r
        at_b = b_scales + e.to(tl.int64) * per_expert + j * per_row
        next_a, next_b = tl.load(at_a, mask=kept, other=0), tl.load(at_b)
        total = tl.zeros((B, B), tl.float32)
        for k in range(0, K, B):
            by_row, by_block = next_a, next_b
            # The next scales, or the last once more, come while the tensor cores are busy.
            at_a += tl.where(k + B < K, line, 0)
            at_b += tl.where(k + B < K, per_column, 0)
            next_a, next_b = tl.load(at_a, mask=kept, other=0), tl.load(at_b)
            product = tl.dot(a.load([m.to(tl.int32), k]), b.load([e * N + j * B, k]).T)
            total += product * (by_row * by_block)[:, None]

        at = out + r[:, None] * N + j * B + tl.arange(0, B)[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=kept[:, None])


@triton.jit(do_not_specialize=["E"])
def _wgrad(
    a, b, a_scales, b_scales, offsets, grads, N, K, E,
    B: tl.constexpr, BE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    blocks = _blocks(offsets, E, B, BE)
    last = tl.cumsum(blocks, 0)
    experts = tl.arange(0, BE)
    rows, columns = N // B, K // B
    for tile in range(tl.program_id(0), E * rows * columns, tl.num_programs(0)):
        e = tile // (rows * columns)
        i, j = _place(tile % (rows * columns), rows, columns, TALL)
        end = tl.sum(tl.where(experts == e, last, 0), 0)
        start = end - tl.sum(tl.where(experts == e, blocks, 0), 0)
        if start < end:
            r, c = i * B + tl.arange(0, B), j * B + tl.arange(0, B)
            at_a = a_scales + start.to(tl.int64) * N + r
            at_b = b_scales + start.to(tl.int64) * K + c
            next_a, next_b = tl.load(at_a), tl.load(at_b)
            total = tl.zeros((B, B), tl.float32)
            for p in range(start, end):
                by_row, by_column = next_a, next_b
                at_a += tl.where(p + 1 < end, N, 0)
                at_b += tl.where(p + 1 < end, K, 0)
                next_a, next_b = tl.load(at_a), tl.load(at_b)
                product = tl.dot(a.load([i * B, p * B]), b.load([j * B, p * B]).T)
                total += product * by_row[:, None] * by_column[None, :]

            grad = tl.load(grads + e).to(tl.pointer_type(tl.float32))
            at = tl.multiple_of(grad, 16) + r.to(tl.int64)[:, None] * K + c[None, :]
            tl.store(at, tl.load(at) + total)


@triton.jit
def _blocks(offsets, E, B: tl.constexpr, BE: tl.constexpr):
    """[BE] blocks of 128 rows of each expert."""
    e = tl.arange(0, BE)
    start = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    return tl.cdiv(end - start, B).to(tl.int32)


@triton.jit
def _place(tile, rows, columns, TALL: tl.constexpr):
    """Row and column of a tile of [rows, columns] tiles, TALL rows at a time."""
    first = tile // (TALL * columns) * TALL
    height = tl.minimum(rows - first, TALL)
    within = tile % (TALL * columns)
    return first + within % height, within // height
