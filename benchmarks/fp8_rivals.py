"""Rivals of the FP8 cases: torch's own products, DeepGEMM and Transformer Engine.

Each is a maker of a forward, as `Case.baselines` takes them: an ImportError says that it does not
install here.  What a rival needs in a layout or with scales of its own is made beforehand and not
timed, but for "deepgemm + layout", whose users pay for it: groups padded to its alignment, one
expert's number a row, and the result's rows taken out again.

Shape legend: as in `cases_fp8`; Q rows with each group's padded to DeepGEMM's alignment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from r1kern.benchmarks.cases_common import Forward, Prepared, Shape, Tensors
from r1kern.kernels.fp8_reference import CODE, LARGEST, blocks, padded_offsets

Run = Callable[[], Tensors]


def _cuda_only(kind: str) -> None:
    if kind == "cpu":
        raise ImportError("has no FP8 kernel for a CPU")


# ----------------------------------------------------------------------------------------- torch


def grouped_mm(kind: str) -> Forward:
    """`torch._grouped_mm` in bfloat16."""

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        *_, offsets, x, wide = tensors
        return (torch._grouped_mm(x, wide.transpose(1, 2), offs=offsets[1:].int()),)

    return forward


def grouped_mm_wgrad(kind: str) -> Forward:
    """`torch._grouped_mm` in bfloat16, added to the float32 gradients."""

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        *_, offsets, grads, grad_y, x = tensors
        grads += torch._grouped_mm(grad_y.t(), x, offs=offsets[1:].int())
        return (grads,)

    return forward


def _one_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and one scale for the last dimension."""
    scales = (x.float().abs().amax(-1) / LARGEST).clamp(min=1e-12)
    return (x.float() / scales[..., None]).to(CODE), scales


def scaled_grouped_mm(kind: str) -> Prepared:
    """`torch._scaled_grouped_mm`: one scale a row and one a column, all that it has on Hopper."""
    _cuda_only(kind)

    def bind(shape: Shape, tensors: Tensors) -> Run:
        *_, offsets, x, wide = tensors
        (a, a_scales), (b, b_scales) = _one_scale(x), _one_scale(wide)
        ends, b = offsets[1:].int(), b.transpose(1, 2)
        return lambda: (
            torch._scaled_grouped_mm(a, b, a_scales, b_scales, offs=ends, out_dtype=x.dtype),
        )

    return Prepared(bind)


def scaled_mm_rows(kind: str) -> Prepared:
    """`torch._scaled_mm`, one scale a row and one a column."""
    _cuda_only(kind)

    def bind(shape: Shape, tensors: Tensors) -> Run:
        *_, x, wide = tensors
        (a, a_scales), (b, b_scales) = _one_scale(x), _one_scale(wide[0])
        scales = a_scales[:, None], b_scales[None]
        return lambda: (torch._scaled_mm(a, b.t(), *scales, out_dtype=x.dtype),)

    return Prepared(bind)


def scaled_mm_blocks(kind: str) -> Prepared:
    """`torch._scaled_mm` with our very codes and scales, 1 x 128 and 128 x 128: cuBLASLt's."""
    _cuda_only(kind)

    def bind(shape: Shape, tensors: Tensors) -> Run:
        a, a_scales, b, b_scales, _, x, _ = tensors
        scales = a_scales.contiguous().t(), b_scales[0].contiguous().t()
        return lambda: (torch._scaled_mm(a, b[0].t(), *scales, out_dtype=x.dtype),)

    return Prepared(bind)


# -------------------------------------------------------------------------------------- DeepGEMM


def deep_gemm_dense(kind: str) -> Prepared:
    _cuda_only(kind)
    import deep_gemm

    def bind(shape: Shape, tensors: Tensors) -> Run:
        a, a_scales, b, b_scales, _, x, _ = tensors
        left, right = (a, a_scales.t()), (b[0], b_scales[0].contiguous())

        def once() -> Tensors:
            out = x.new_empty(len(a), b.shape[1])
            deep_gemm.fp8_gemm_nt(left, right, out)
            return (out,)

        return once

    return Prepared(bind)


def _padded_rows(offsets: Tensor, R: int, align: int) -> tuple[Tensor, Tensor]:
    """int64 [R], the place of each row among the Q, and int32 [Q], the expert of each of those,
    -1 for padding; the sizes of the groups are not asked for."""
    counts = offsets.diff()
    padded = (counts + align - 1) // align * align
    first = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    rows = torch.arange(R, device=offsets.device)
    expert = torch.searchsorted(offsets, rows, right=True) - 1
    place = rows - offsets[expert] + first[expert]
    Q = (R + (align - 1) * len(counts)) // align * align
    layout = torch.full((Q,), -1, dtype=torch.int32, device=offsets.device)
    return place, layout.index_copy_(0, place, expert.int())


def _deep_layout(tensors: Tensors, align: int) -> tuple[tuple, tuple, Tensor, Tensor]:
    """Both operands, the expert of each row, and the place of each row."""
    a, a_scales, b, b_scales, offsets, *_ = tensors
    place, layout = _padded_rows(offsets, len(a), align)
    codes = torch.zeros(len(layout), a.shape[1], dtype=torch.uint8, device=a.device)
    codes.index_copy_(0, place, a.view(torch.uint8))
    scales = a_scales.new_zeros(len(a_scales), len(layout)).index_copy_(1, place, a_scales)
    return (codes.view(CODE), scales.t()), (b, b_scales.contiguous()), layout, place


def deep_gemm_grouped(kind: str) -> Prepared:
    """The product alone, on groups that are padded already."""
    _cuda_only(kind)
    import deep_gemm

    def bind(shape: Shape, tensors: Tensors) -> Run:
        align = deep_gemm.get_mk_alignment_for_contiguous_layout()
        left, right, layout, _ = _deep_layout(tensors, align)
        x = tensors[-2]

        def once() -> Tensors:
            out = x.new_empty(len(layout), right[0].shape[1])
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(left, right, out, layout)
            return (out,)

        return once

    def restore(shape: Shape, tensors: Tensors, results: Tensors) -> Tensors:
        align = deep_gemm.get_mk_alignment_for_contiguous_layout()
        place, _ = _padded_rows(tensors[4], len(tensors[0]), align)
        return (results[0][place],)

    return Prepared(bind, restore)


def deep_gemm_with_layout(kind: str) -> Forward:
    """From our operands to our result: padding, product, rows taken out."""
    _cuda_only(kind)
    import deep_gemm

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        align = deep_gemm.get_mk_alignment_for_contiguous_layout()
        left, right, layout, place = _deep_layout(tensors, align)
        out = tensors[-2].new_empty(len(layout), right[0].shape[1])
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(left, right, out, layout)
        return (out[place],)

    return forward


def _deep_wgrad_operands(tensors: Tensors) -> tuple[tuple, tuple, list[int], Tensor]:
    """Both operands with each group's columns apart, and the groups' sizes: it wants them on the
    host."""
    *operands, offsets, _, _, _ = tensors
    first = padded_offsets(offsets)
    sizes = first.diff().tolist()
    end = sum(sizes)
    sides = []
    for codes, scales in (operands[:2], operands[2:]):
        runs = codes[:, :end].view(torch.uint8).split(sizes, dim=1)
        apart = torch.cat([run.flatten() for run in runs]).view(CODE)
        sides.append((apart, scales[: blocks(end)].t()))
    return *sides, sizes, torch.tensor(sizes, dtype=torch.int32, device=offsets.device)


def deep_gemm_wgrad(kind: str) -> Prepared:
    """The product alone, the groups' columns apart already and their sizes on the host."""
    _cuda_only(kind)
    import deep_gemm

    def bind(shape: Shape, tensors: Tensors) -> Run:
        left, right, sizes, layout = _deep_wgrad_operands(tensors)
        grads = tensors[5]

        def once() -> Tensors:
            deep_gemm.k_grouped_fp8_gemm_nt_contiguous(left, right, grads, sizes, layout, grads)
            return (grads,)

        return once

    return Prepared(bind)


def deep_gemm_wgrad_with_layout(kind: str) -> Forward:
    """From our operands, the groups' sizes brought to the host."""
    _cuda_only(kind)
    import deep_gemm

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        left, right, sizes, layout = _deep_wgrad_operands(tensors)
        grads = tensors[5]
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(left, right, grads, sizes, layout, grads)
        return (grads,)

    return forward
