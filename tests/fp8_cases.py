"""Operands of the FP8 products: groups of every shape, memory nobody may look at poisoned."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from truth import assert_as_good

from r1kern.kernels import fp8_reference as reference

GROUPS = {
    "ragged": [5, 130, 1],
    "empty": [0, 3, 0, 131, 0],
    "one-hot": [0, 0, 140, 0],
    "one row each": [1, 1, 1],
    "whole tiles": [128, 256],
    "all empty": [0, 0],
    "dense": [33],
}
NAN = float("nan")


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


class Forward(NamedTuple):
    """Operands of `grouped_gemm`, parts left out."""

    a: Tensor
    a_scales: Tensor
    b: Tensor
    b_scales: Tensor
    offsets: Tensor


def forward(counts: list[int], N: int, K: int, parts: int = 1, power_of_two: bool = False):
    torch.manual_seed(0)
    a = reference.quantize_rows(wild(sum(counts), K), power_of_two)
    made = [reference.quantize_weight(wild(N, K), parts, power_of_two) for _ in counts]
    b, b_scales = (torch.stack(x) for x in zip(*made, strict=True))
    return Forward(*a, b, b_scales, offsets_of(counts))


def backward(counts: list[int], N: int, K: int):
    """Operands of `grouped_wgrad` and gradients that begin as noise, -0 for an expert without rows;
    what is past the last expert's blocks is NaN."""
    torch.manual_seed(0)
    offsets = offsets_of(counts)
    end = int(reference.padded_offsets(offsets)[-1])
    operands = []
    for size in (N, K):
        codes, scales = reference.quantize_columns(wild(sum(counts), size), offsets)
        codes[:, end:] = NAN
        scales[end // 128 :] = NAN
        operands += [codes, scales]
    grads = [torch.randn(N, K) if count else torch.full((N, K), -0.0) for count in counts]
    return *operands, offsets, grads


def wild(rows: int, columns: int) -> Tensor:
    """Normal, each row and column of a magnitude of its own."""
    rows, columns = torch.randn(rows, 1).exp(), torch.randn(1, columns).exp()
    return torch.randn(len(rows), columns.shape[1]) * rows * columns


def assert_forward(got: Tensor, x: Forward, n_parts: int = 1, k_parts: int = 1) -> None:
    """As good as the same product by torch in float32 (rounded to the dtype of `got`), against
    float64 of the dequantised operands, expert by expert."""
    rows = reference.dequantize_rows(x.a, x.a_scales)
    assert got.shape == (len(x.a), x.b.shape[1])
    for e, (start, end) in enumerate(pairwise(x.offsets.tolist())):
        weight = reference.dequantize_weight(x.b[e], x.b_scales[e], n_parts, k_parts)
        plain = (rows[start:end] @ weight.t()).to(got.dtype)
        truth = rows[start:end].double() @ weight.double().t()
        assert_as_good([got[start:end]], [plain], [truth])


def assert_backward(got: list[Tensor], before: list[Tensor], a, a_scales, b, b_scales, offsets):
    left, right = (reference.dequantize_columns(*x) for x in ((a, a_scales), (b, b_scales)))
    counts = offsets.diff().tolist()
    bounds = pairwise(reference.padded_offsets(offsets).tolist())
    for grad, old, count, (start, end) in zip(got, before, counts, bounds, strict=True):
        if count == 0:
            assert torch.equal(grad.view(torch.int32), old.view(torch.int32))  # -0 + 0 is 0
        x, y = left[:, start:end], right[:, start:end]
        truth = old.double() + x.double() @ y.double().t()
        assert_as_good([grad], [old + x @ y.t()], [truth])
