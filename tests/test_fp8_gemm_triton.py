"""The FP8 products' Triton kernels, run by Triton's interpreter, against float64 of the dequantised
operands."""

import pytest
import torch
from fp8_cases import GROUPS, NAN, Forward, assert_backward, assert_forward, backward, forward
from interpreter import interpreted
from truth import BF16, F32


@pytest.fixture(scope="module")
def kernels():
    with interpreted("fp8_gemm_triton") as module:
        yield module


def product(kernels, x, dtype):
    out = torch.full((len(x.a) + 2, x.b.shape[1]), NAN, dtype=dtype)
    kernels.grouped_gemm(*x, out[: len(x.a)])
    assert out[len(x.a) :].isnan().all()
    return out[: len(x.a)]


def table(grads):
    return torch.tensor([grad.data_ptr() for grad in grads])


@pytest.mark.parametrize("counts", [c for c in GROUPS.values() if sum(c)], ids=lambda c: f"{c}")
def test_product(kernels, counts):
    x = forward(counts, N=128, K=256)
    assert_forward(product(kernels, x, F32), x)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_bfloat16_and_more_columns(kernels, power_of_two):
    x = forward([3, 129], N=384, K=384, power_of_two=power_of_two)
    assert_forward(product(kernels, x, BF16), x)


def test_more_tiles_of_rows_than_share_columns(kernels, monkeypatch):
    monkeypatch.setitem(kernels.CONSTANTS, "TALL", 2)
    x = forward([1] * 5, N=256, K=128)
    assert_forward(product(kernels, x, F32), x)


def test_scales_of_a_transposed_weight(kernels):
    x = forward([2, 3], N=256, K=384)
    scales = x.b_scales.transpose(1, 2).contiguous().transpose(1, 2)
    assert scales.stride() != x.b_scales.stride()
    assert torch.equal(product(kernels, x._replace(b_scales=scales), F32), product(kernels, x, F32))


def test_what_is_not_a_row_is_not_looked_at(kernels):
    """The padding of the scales' lines, an expert without rows, and rows of other experts."""
    x = forward([5, 0, 2], N=128, K=256)
    clean = product(kernels, x, F32)
    lines = torch.full((2, 8), NAN)
    lines[:, :7] = x.a_scales
    x.b_scales[1] = NAN
    dirty = Forward(x.a, lines[:, :7], *x[2:])
    assert torch.equal(product(kernels, dirty, F32), clean)
    x.b_scales[2] = NAN
    dirty = product(kernels, x, F32)
    assert torch.equal(dirty[:5], clean[:5]) and dirty[5:].isnan().all()


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_weight_gradient(kernels, counts):
    *operands, grads = backward(counts, N=128, K=256)
    before = [grad.clone() for grad in grads]
    kernels.grouped_wgrad(*operands, table(grads), 128, 256)
    assert_backward(grads, before, *operands)


def test_weight_gradient_of_more_rows_than_columns(kernels):
    *operands, grads = backward([200], N=384, K=128)
    before = [grad.clone() for grad in grads]
    kernels.grouped_wgrad(*operands, table(grads), 384, 128)
    assert_backward(grads, before, *operands)
