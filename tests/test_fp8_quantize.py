"""FP8 on CPU: the reference against plain arithmetic, the C++ against the reference, in bits."""

import math
from itertools import pairwise

import pytest
import torch
from fp8_quantize_cases import (
    BF16,
    COUNTS,
    F32,
    WILD,
    assert_bits,
    assert_near,
    both_ways,
    offsets_of,
    shapes,
    wild,
)
from hypothesis import example, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from truth import assert_as_good

from r1kern.kernels import fp8_quantize as fp8
from r1kern.kernels import fp8_reference as reference
from r1kern.kernels.fp8_swiglu import swiglu_backward_quantize, swiglu_quantize


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------- the reference


def value_of(code):
    """Of an e4m3 code: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity."""
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    size = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -size if code & 0x80 else size


VALUES = [value_of(code) for code in range(0x7F)]


def nearest(x):
    """The code nearest to x, float64; of two, the even one.  By trying all."""
    if math.isnan(x):
        return 0x7F
    code = min(range(0x7F), key=lambda c: (abs(VALUES[c] - abs(x)), c & 1))
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)


def test_tables_of_codes_agree():
    every = torch.arange(256, dtype=torch.uint8).view(reference.CODE)[None]
    expected = torch.tensor([[value_of(code) for code in range(256)]])
    scales = torch.ones(2, 1)
    assert_bits(reference.dequantize_rows(every, scales), expected)
    assert_bits(fp8.dequantize_rows(every, scales), expected)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_reference_is_the_nearest_code_of_the_quotient(power_of_two):
    ties = [(a + b) / 2 for a, b in pairwise(VALUES)]
    near = [math.nextafter(t, s) for t in ties for s in (0, 1e9)]
    exact = [448.0, *[sign * v for v in VALUES + ties + near for sign in (1, -1)]]
    rows = torch.cat(
        [
            torch.tensor(exact, dtype=torch.float64).float(),  # of scale 1 where tiles hold 448
            wild(0, 3, 1200, spread=2.0).flatten(),
            wild(1, 1, 1200, spread=40.0).flatten(),
        ]
    )
    rows = torch.nn.functional.pad(rows, (0, -len(rows) % 127)).view(-1, 127)
    x = torch.cat([rows, torch.full((len(rows), 1), 448.0)], 1)
    x[len(x) // 2 :, -1] = 0.0
    codes, scales = reference.quantize_rows(x, power_of_two)
    for row, got, scale in zip(x, codes.view(torch.uint8), scales[0], strict=True):
        finite = [abs(v) for v in row.tolist() if not math.isnan(v)]
        quotient = torch.tensor(max(finite), dtype=torch.float64) / 448
        expected = max(quotient.float().item(), 2.0**-126)
        if power_of_two and expected < math.inf:
            expected = 2.0 ** math.ceil(math.log2(expected))
        assert scale.item() == expected
        for v, code in zip(row.tolist(), got.tolist(), strict=True):
            with_nan = torch.tensor(v, dtype=torch.float64) / expected
            assert (
                code & 0x7F == 0x7F
                if math.isnan(with_nan)
                else code == nearest(with_nan.float().item())
            )


def test_reference_by_columns_is_that_by_rows_of_each_expert():
    offsets = offsets_of([0, 129, 1, 37, 0])
    x = wild(2, 167, 21)
    codes, scales = reference.quantize_columns(x, offsets)
    for e, first in enumerate(reference.padded_offsets(offsets)[:-1].tolist()):
        rows = x[offsets[e] : offsets[e + 1]]
        if len(rows):
            theirs, their_scales = reference.quantize_rows(rows.t())
            assert_bits(codes[:, first : first + len(rows)], theirs)
            tiles = len(their_scales)
            assert_bits(scales[first // 128 : first // 128 + tiles], their_scales)


# ---------------------------------------------------------------------------- C++


@settings(max_examples=30)
@given(shapes())
@example(([0, 129, 1, 200], 300, F32, False, 3, 40.0, 0.3))
@example(([0], 7, BF16, True, 0, 1.0, 0.0))
def test_quantize_is_the_reference(shape):
    counts, K, dtype, power_of_two, seed, spread, share = shape
    offsets = offsets_of(counts)
    x = wild(seed, sum(counts), K, dtype, spread, share)
    got = fp8.quantize(x, offsets, power_of_two, True, True)
    for a, b in zip(got, both_ways(x, offsets, power_of_two), strict=True):
        assert_bits(a, b)
    finite = [t.nan_to_num(0.0) if t.dtype == F32 else t for t in got]
    assert_bits(fp8.dequantize_rows(*finite[:2]), reference.dequantize_rows(*finite[:2]))
    assert_bits(fp8.dequantize_columns(*finite[2:]), reference.dequantize_columns(*finite[2:]))


@settings(max_examples=15)
@given(shapes())
def test_weights_are_the_reference(shape):
    counts, K, dtype, power_of_two, seed, spread, share = shape
    for parts in (1, 2):
        N = parts * max(1, sum(counts) // 2)
        weights = [wild(seed + e, N, K, dtype, spread, share) for e in range(2)]
        codes, codes_t, scales = fp8.quantize_weights(weights, parts, power_of_two, True)
        for e, weight in enumerate(weights):
            expected = reference.quantize_weight(weight, parts, power_of_two)
            assert_bits(codes[e], expected[0])
            assert_bits(codes_t[e], expected[0].t())
            assert_bits(scales[e], expected[1])
            whole = reference.dequantize_weight(*expected, parts)
            assert_bits(fp8.dequantize_weight(codes[e], scales[e], parts), whole)
            assert_bits(fp8.dequantize_weight(codes_t[e], scales[e].t(), 1, parts), whole.t())


def test_dequantize_takes_lines_of_a_larger_tensor():
    offsets = offsets_of([130, 3])
    *_, codes, scales = fp8.quantize(wild(0, 133, 9, spread=1.0, share=0.0), offsets, False, 1, 1)
    part = codes[:, 256:384], scales[2:3]
    assert_bits(fp8.dequantize_columns(*part), reference.dequantize_columns(*part))


def test_threads_and_poisoned_memory_change_nothing(poisoned, two_threads):
    for counts in COUNTS[:3]:
        offsets, R = offsets_of(counts), sum(counts)
        x, h, probs = wild(1, R, 140), torch.randn(R, 280), torch.rand(R)
        for columns in (True, False):
            runs = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                runs.append(
                    [
                        *fp8.quantize(x, offsets, False, True, columns),
                        *swiglu_quantize(h, probs, offsets, False, columns),
                        *swiglu_backward_quantize(h[:, :140], h, probs, offsets, True),
                        *fp8.quantize_weights([x, x], 1, False, columns) * (R > 0),
                    ]
                )
            for a, b in zip(*runs, strict=True):
                assert_bits(a, b)
            for t in runs[0][4:8] if columns else ():
                assert not t.float().isnan().any()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_swiglu_is_the_reference(dtype, power_of_two):
    for seed, counts in enumerate(COUNTS):
        torch.manual_seed(seed)
        offsets, R = offsets_of(counts), sum(counts)
        for I in (128, 50):  # noqa: E741
            h, grad = (torch.randn(R, 2 * I) * 3).to(dtype), torch.randn(R, I).to(dtype)
            probs = torch.rand(R)
            got = swiglu_quantize(h, probs, offsets, power_of_two, True)
            y = reference.swiglu(h, probs)
            assert_near(got, both_ways(y, offsets, power_of_two), offsets)
            *got, grad_probs = swiglu_backward_quantize(grad, h, probs, offsets, power_of_two)
            grad_h, expected = reference.swiglu_backward(grad, h, probs)
            assert_near(got, both_ways(grad_h, offsets, power_of_two), offsets)
            torch.testing.assert_close(grad_probs, expected, rtol=1e-6, atol=1e-6 * I)


def test_swiglu_at_its_extremes():
    gate = torch.tensor([-1e38, -100.0, -90.0, -0.0, 0.0, 90.0, 1e30, math.nan])
    h = torch.stack([gate, torch.ones(8)], 1)
    offsets = offsets_of([8])
    codes, scales, *_ = swiglu_quantize(h, torch.ones(8), offsets, False, False)
    y = fp8.dequantize_rows(codes, scales)[:, 0]
    assert y[:3].abs().max() < 1e-36 and y[3:5].abs().max() == 0 and y[7].isnan()
    torch.testing.assert_close(y[5:7], gate[5:7])
    *_, grad_probs = swiglu_backward_quantize(torch.ones(8, 1), h, torch.ones(8), offsets, False)
    assert grad_probs[:7].isfinite().all() and grad_probs[7].isnan()


def test_swiglu_gradient_against_float64():
    """Scales apart, the C++ has the error of the codes alone: that of quantising the truth."""
    torch.manual_seed(0)
    offsets = offsets_of([100, 60])
    h, grad, probs = torch.randn(160, 256), torch.randn(160, 128), torch.rand(160)
    wide = h.double().requires_grad_(), probs.double().requires_grad_()
    gate, up = wide[0].chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up * wide[1][:, None]
    truth = torch.autograd.grad(y, wide, grad.double())
    plain = reference.swiglu_backward(grad, h, probs)
    codes, scales, _, _, grad_probs = swiglu_backward_quantize(grad, h, probs, offsets, False)
    ideal = reference.dequantize_rows(*reference.quantize_rows(truth[0].float()))
    error = (fp8.dequantize_rows(codes, scales) - truth[0]).norm()
    assert error <= 1.001 * (ideal - truth[0]).norm()
    assert_as_good([grad_probs], [plain[1]], [truth[1]])
    assert_as_good([plain[0]], [plain[0].bfloat16().float()], [truth[0]])


# ---------------------------------------------------------------------------- registration


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(dtype):
    offsets, tests = offsets_of([3, 0, 130]), ("test_schema", "test_faketensor")
    x, h, probs = torch.randn(133, 20).to(dtype), torch.randn(133, 40).to(dtype), torch.rand(133)
    for rows, columns in ((True, True), (True, False), (False, True)):
        opcheck(fp8.quantize, (x, offsets, False, rows, columns), test_utils=tests)
    for transposed in (True, False):
        opcheck(fp8.quantize_weights, ([h, h], 1, True, transposed), test_utils=tests)
    opcheck(swiglu_quantize, (h, probs, offsets, False, True), test_utils=tests)
    opcheck(swiglu_backward_quantize, (x, h, probs, offsets, False), test_utils=tests)
    opcheck(fp8.quantize, (x.t().contiguous().t(), offsets, False, True, True), test_utils=tests)


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones():
    for counts in COUNTS:
        R, inputs = sum(counts), []
        for mode in (torch.no_grad(), FakeTensorMode()):
            with mode:
                x, h = torch.zeros(R, 37), torch.zeros(R, 74)
                offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
                if isinstance(mode, torch.no_grad):
                    offsets = offsets_of(counts)
                inputs.append(
                    [
                        *fp8.quantize(x, offsets, False, True, True),
                        *fp8.quantize(x, offsets, False, False, True),
                        *swiglu_quantize(h, torch.zeros(R), offsets, False, False),
                        *swiglu_backward_quantize(x, h, torch.zeros(R), offsets, False),
                        *(fp8.quantize_weights([h], 1, False, True) if R else ()),
                    ]
                )
        for real, fake in zip(*inputs, strict=True):
            assert real.shape == fake.shape and real.dtype == fake.dtype
            assert real.stride() == fake.stride()


def test_wild_numbers_are_all_seen():
    x = wild(0, 400, 100, share=0.05)
    for number in WILD:
        found = x.isnan() if math.isnan(number) else x == number
        assert found.any()
