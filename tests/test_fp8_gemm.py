"""The FP8 products on CPU against float64 of the dequantised operands; their registration."""

import pytest
import torch
from fp8_cases import GROUPS, Forward, assert_backward, assert_forward, backward, forward
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from truth import BF16, F32

from r1kern.errors import UserError
from r1kern.kernels import fp8_gemm
from r1kern.kernels.fp8_gemm import grouped_gemm, grouped_wgrad


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_product(poisoned, counts, dtype):
    x = forward(counts, N=200, K=300)
    got = grouped_gemm(*x, 1, 1, dtype)
    assert got.dtype == dtype
    assert_forward(got, x)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_blocks_that_start_anew_in_each_part(poisoned, power_of_two):
    x = forward([70, 0, 9], N=2 * 150, K=130, parts=2, power_of_two=power_of_two)
    assert x.b_scales.shape == (3, 4, 2)
    assert_forward(grouped_gemm(*x, 2, 1, F32), x, n_parts=2)
    # The gradient of the input: the weight transposed, its scales a transposed view.
    grad = forward([70, 0, 9], N=130, K=2 * 150)
    x = Forward(*grad[:2], x.b.transpose(1, 2).contiguous(), x.b_scales.transpose(1, 2), x.offsets)
    b_scales = x.b_scales.contiguous()
    got = grouped_gemm(*x, 1, 2, F32)
    assert torch.equal(got, grouped_gemm(*x._replace(b_scales=b_scales), 1, 2, F32))
    weight = [fp8_gemm.dequantize_weight(b, s, 1, 2) for b, s in zip(x.b, b_scales, strict=True)]
    rows = fp8_gemm.dequantize_rows(x.a, x.a_scales)
    assert torch.equal(got[70:], rows[70:] @ weight[2].t())
    assert_forward(got, x._replace(b_scales=b_scales), k_parts=2)


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_weight_gradient_accumulates(poisoned, counts):
    *operands, grads = backward(counts, N=200, K=300)
    before = [grad.clone() for grad in grads]
    grouped_wgrad(*operands, grads)
    assert_backward(grads, before, *operands)
    once = [grad.clone() for grad in grads]
    grouped_wgrad(*operands, grads)
    assert_backward(grads, once, *operands)


def test_the_same_bits_every_time():
    x = forward([40, 200], N=256, K=384)
    assert torch.equal(grouped_gemm(*x, 1, 1, F32), grouped_gemm(*x, 1, 1, F32))
    *operands, grads = backward([40, 200], N=256, K=384)
    other = [grad.clone() for grad in grads]
    grouped_wgrad(*operands, grads)
    grouped_wgrad(*operands, other)
    assert all(map(torch.equal, grads, other))


def test_a_row_does_not_depend_on_its_neighbours():
    """NaN and infinity stay in their row of the product."""
    x = forward([4, 5], N=130, K=260)
    clean = grouped_gemm(*x, 1, 1, F32)
    x.a_scales[:, 6] = torch.inf
    dirty = grouped_gemm(*x, 1, 1, F32)
    others = torch.arange(9) != 6
    assert torch.equal(dirty[others], clean[others]) and not dirty[6].isfinite().any()


# `opcheck`'s look at the schema compares inputs by `allclose`, which torch has not for e4m3.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck():
    x = forward([3, 0, 5], N=130, K=140, parts=2)
    for dtype in (F32, BF16):
        opcheck(grouped_gemm, (*x, 2, 1, dtype), test_utils=CHECKS)
    opcheck(grouped_wgrad, backward([3, 0, 5], N=20, K=30), test_utils=CHECKS)


def test_operands_are_left_alone():
    x = forward([3, 0, 5], N=130, K=140)
    *operands, grads = backward([3, 0, 5], N=20, K=30)
    before = [t.clone().view(torch.uint8) for t in (*x, *operands)]
    grouped_gemm(*x, 1, 1, F32)
    grouped_wgrad(*operands, grads)
    assert all(map(torch.equal, before, [t.view(torch.uint8) for t in (*x, *operands)]))


def test_fake_tensors_of_the_671b_model():
    with FakeTensorMode():
        a = torch.empty(65_536, 7168, dtype=torch.float8_e4m3fn)
        b = torch.empty(32, 4096, 7168, dtype=torch.float8_e4m3fn)
        offsets = torch.empty(33, dtype=torch.int64)
        got = grouped_gemm(
            a, torch.empty(56, 65_536), b, torch.empty(32, 32, 56), offsets, 2, 1, BF16
        )
        assert got.shape == (65_536, 4096) and got.dtype == BF16


@pytest.mark.parametrize(("size", "parts"), [(100, 1), (384, 2), (64, 1)])
def test_what_the_gpu_kernels_cannot_cut_into_blocks_is_refused(size, parts):
    with pytest.raises(UserError, match=rf"^K must be a multiple of {128 * parts} .*got {size}"):
        fp8_gemm._whole_blocks("K", size, parts)
    fp8_gemm._whole_blocks("K", 256 * parts, parts)


@pytest.mark.parametrize(
    "addresses", [(64,), (64, 128, 192), (192, 128, 64), (64, 80, 512), (512, 64, 80)]
)
def test_table_of_addresses(addresses):
    table = fp8_gemm._table(addresses, torch.device("cpu"))
    assert table.dtype == torch.int64 and tuple(table.tolist()) == addresses
