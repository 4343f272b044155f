"""The Triton kernels of blockwise FP8 in Triton's interpreter, against the reference in bits."""

import pytest
import torch
from fp8_quantize_cases import (
    BF16,
    COUNTS,
    F32,
    assert_bits,
    assert_near,
    both_ways,
    offsets_of,
    wild,
)
from interpreter import interpreted

from r1kern.kernels import fp8_reference as reference

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(scope="module")
def quantize_module():
    with interpreted("fp8_quantize_triton") as module:
        yield module


@pytest.fixture(scope="module")
def swiglu_module():
    with interpreted("fp8_swiglu_triton") as module:
        yield module


def written(codes, offsets):
    """`quantize`'s results, without what lies past the last expert."""
    row_codes, row_scales, column_codes, column_scales = codes
    used = reference.padded_offsets(offsets)[-1]
    return row_codes, row_scales, column_codes[:, :used], column_scales[: used // 128]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantize_is_the_reference(quantize_module, poisoned, dtype, power_of_two):
    for seed, (counts, K) in enumerate(zip(COUNTS, (150, 128, 1, 130, 16, 9), strict=True)):
        offsets = offsets_of(counts)
        for spread, share in ((1.0, 0.0), (40.0, 0.1)):
            x = wild(seed, sum(counts), K, dtype, spread, share)
            got = quantize_module.quantize(x, offsets, power_of_two, True, True)
            expected = both_ways(x, offsets, power_of_two)
            for a, b in zip(written(got, offsets), written(expected, offsets), strict=True):
                assert_bits(a, b)
    alone = quantize_module.quantize(x, offsets, power_of_two, True, False)
    assert_bits(alone[0], expected[0])
    assert alone[2].shape == alone[3].shape == (0,)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quotients_next_to_ties(quantize_module, power_of_two):
    """x / scale within a few units in the last place of where codes part, at every size."""
    g = torch.Generator().manual_seed(0)
    steps = torch.randint(-3, 4, (128, 128), generator=g)
    for exponent in (-144, -120, -61, 0):
        top = torch.rand(128, 1, generator=g) + 1
        halves = (torch.randint(16, 32, (128, 128), generator=g) + 0.5) * 14 / 31.5
        x = torch.ldexp(top * halves.clamp(max=14), torch.tensor(exponent))
        x = (x.view(torch.int32) + steps).view(F32)
        x[:, 0] = torch.ldexp(14 * top[:, 0], torch.tensor(exponent)) * 1.0
        got = quantize_module.quantize(x, offsets_of([128]), power_of_two, True, True)
        for a, b in zip(got, both_ways(x, offsets_of([128]), power_of_two), strict=True):
            assert_bits(a, b)


def test_quotients_next_to_ties_of_the_smallest_numbers(quantize_module):
    """Denormal ones, of which the remainder of the division would be none that float32 has."""
    g = torch.Generator().manual_seed(0)
    ties = (torch.randint(8, (1024,), generator=g) + 0.5) / 512
    small = (2**-126 * (1 + 3 * torch.rand(1024, generator=g)) * ties).double()
    scales = (small / ties).float()
    x = torch.stack([448 * scales, small.float()], 1)
    codes, scales, *_ = quantize_module.quantize(x, offsets_of([1024]), False, True, False)
    for a, b in zip((codes, scales), reference.quantize_rows(x), strict=True):
        assert_bits(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_weights_are_the_reference(quantize_module, poisoned, dtype, power_of_two):
    for parts, N, K, spread in ((1, 130, 140, 40.0), (2, 6, 5, 1.0)):
        weights = [wild(e, N, K, dtype, spread) for e in range(2)]
        for transposed in (True, False):
            codes, codes_t, scales = quantize_module.quantize_weights(
                weights, parts, power_of_two, transposed
            )
            for e, weight in enumerate(weights):
                expected = reference.quantize_weight(weight, parts, power_of_two)
                assert_bits(codes[e], expected[0])
                assert_bits(scales[e], expected[1])
                if transposed:
                    assert_bits(codes_t[e], expected[0].t())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_swiglu_is_the_reference(swiglu_module, poisoned, dtype, power_of_two):
    for counts, I in (([0, 129, 1], 128), ([20], 50), ([0], 128)):  # noqa: E741
        torch.manual_seed(I)
        offsets, R = offsets_of(counts), sum(counts)
        h, grad = (torch.randn(R, 2 * I) * 3).to(dtype), torch.randn(R, I).to(dtype)
        probs = torch.rand(R)
        got = swiglu_module.swiglu_quantize(h, probs, offsets, power_of_two, True)
        y = reference.swiglu(h, probs)
        assert_near(got, both_ways(y, offsets, power_of_two), offsets)
        *got, grad_probs = swiglu_module.swiglu_backward_quantize(
            grad, h, probs, offsets, power_of_two
        )
        grad_h, expected = reference.swiglu_backward(grad, h, probs)
        assert_near(got, both_ways(grad_h, offsets, power_of_two), offsets)
        torch.testing.assert_close(grad_probs, expected, rtol=1e-6, atol=1e-6 * I)


def test_more_experts_than_rows(quantize_module):
    counts = [0] * 33
    counts[3], counts[32] = 2, 1
    offsets, x = offsets_of(counts), wild(0, 3, 16)
    got = quantize_module.quantize(x, offsets, False, True, True)
    expected = both_ways(x, offsets, False)
    for a, b in zip(written(got, offsets), written(expected, offsets), strict=True):
        assert_bits(a, b)
