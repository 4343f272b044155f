"""Linear layer and expert block in FP8: their gradients, written from the reference; what is kept,
accumulated, lost and refused."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from truth import BF16, F32, assert_as_good

from r1kern.errors import UserError
from r1kern.kernels import fp8_reference as reference
from r1kern.ops import fp8

E4M3 = reference.CODE


def rows_as_codes(x):
    """What FP8 leaves of rows, float64."""
    return reference.dequantize_rows(*reference.quantize_rows(x)).double()


def columns_as_codes(x, bounds):
    """What FP8 leaves of [R, K] in tiles of 128 rows of one expert, float64."""
    parts = [reference.quantize_columns(x[i:j], torch.tensor([0, j - i])) for i, j in bounds]
    restored = [reference.dequantize_columns(*part).t().double() for part in parts]
    return torch.cat([x[: j - i] for x, (i, j) in zip(restored, bounds, strict=True)])


def weight_as_codes(w, parts=1):
    return reference.dequantize_weight(*reference.quantize_weight(w, parts), parts).double()


def grads_as_codes(grad, x, bounds):
    grad, x = columns_as_codes(grad, bounds), columns_as_codes(x, bounds)
    return [grad[i:j].t() @ x[i:j] for i, j in bounds]


def near(got, expected):
    """A value on the edge between two codes may fall either way: small in the mean."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= 2e-3 * b.double().norm() + 1e-30


def linear_inputs(T=150, K=140, N=200, dtype=F32):
    torch.manual_seed(0)
    x = torch.randn(T, K).to(dtype).requires_grad_()
    weight = (torch.randn(N, K) / K**0.5).to(dtype).requires_grad_()
    return x, weight, torch.randn(T, N).to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_linear(poisoned, dtype):
    x, weight, g = linear_inputs(dtype=dtype)
    y = fp8.fp8_linear(x.view(3, 50, -1), weight, fp8.quantize_weights([weight]))
    assert y.shape == (3, 50, 200) and y.dtype == dtype
    y.backward(g.view(3, 50, -1))
    w, one = weight_as_codes(weight.detach()), [(0, 150)]
    (grad,) = grads_as_codes(g, x.detach(), one)
    truth = [rows_as_codes(x.detach()) @ w.t(), rows_as_codes(g) @ w, grad]
    plain = [t.to(dtype) for t in truth]
    assert_as_good([y.detach().flatten(0, 1), x.grad, weight.grad], plain, truth)


def test_linear_is_near_the_product_it_stands_for():
    x, weight, g = linear_inputs()
    fp8.fp8_linear(x, weight, fp8.quantize_weights([weight]), power_of_two=True).backward(g)
    got = [fp8.fp8_linear(x, weight, fp8.quantize_weights([weight])), x.grad, weight.grad]
    exact = [x @ weight.t(), g @ weight, g.t() @ x]
    for a, b in zip(got, exact, strict=True):  # e4m3 rounds by at most 1 / 16, 0.026 rms
        assert 0.02 < (a - b).norm() / b.norm() < 0.05


def test_linear_adds_to_a_gradient_that_is_given():
    x, weight, g = linear_inputs()
    quantized = fp8.quantize_weights([weight])
    fp8.fp8_linear(x, weight, quantized).backward(g)
    expected = weight.grad.clone()
    main = torch.ones(200, 140)
    fp8.fp8_linear(x, weight, quantized, grad=main).backward(g)
    near([main - 1], [expected])


COUNTS = [70, 0, 131, 1]


def expert_inputs(dtype=F32, H=136, width=100):
    torch.manual_seed(0)
    R, E = sum(COUNTS), len(COUNTS)
    rows, probs = torch.randn(R, H).to(dtype).requires_grad_(), torch.rand(R).requires_grad_()
    fc1 = [(torch.randn(2 * width, H) / H**0.5).to(dtype).requires_grad_() for _ in range(E)]
    fc2 = [(torch.randn(H, width) / width**0.5).to(dtype).requires_grad_() for _ in range(E)]
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    return rows, probs, offsets, fc1, fc2


def quantized(fc1, fc2):
    return fp8.quantize_weights(fc1, parts=2), fp8.quantize_weights(fc2)


def experts_by_hand(rows, probs, offsets, fc1, fc2, g):
    """Output and gradients from the reference's roundings, products in float64."""
    bounds = list(pairwise(offsets.tolist()))

    def product(x, weights, parts=1, transposed=False):
        x = rows_as_codes(x)
        ws = [weight_as_codes(w.detach(), parts) for w in weights]
        ys = [x[i:j] @ (w if transposed else w.t()) for (i, j), w in zip(bounds, ws, strict=True)]
        return torch.cat(ys).float()

    rows, probs = rows.detach(), probs.detach()
    h = product(rows, fc1, parts=2)
    a = reference.swiglu(h, probs)
    y, grad_a = product(a, fc2), product(g, fc2, transposed=True)
    grad_h, grad_probs = reference.swiglu_backward(grad_a, h, probs)
    grad_rows = product(grad_h, fc1, parts=2, transposed=True)
    weights = grads_as_codes(grad_h, rows, bounds) + grads_as_codes(g, a, bounds)
    return [y, grad_rows, grad_probs, *weights]


def test_experts(poisoned):
    rows, probs, offsets, fc1, fc2 = expert_inputs()
    y = fp8.fp8_experts(rows, probs, offsets, fc1, fc2, *quantized(fc1, fc2))
    g = torch.randn_like(y)
    y.backward(g)
    got = [y.detach(), rows.grad, probs.grad, *(w.grad for w in fc1 + fc2)]
    near(got, experts_by_hand(rows, probs, offsets, fc1, fc2, g))
    assert not fc1[1].grad.any() and not fc2[1].grad.any()


def test_experts_in_bfloat16_are_near_the_block_they_stand_for(poisoned):
    rows, probs, offsets, fc1, fc2 = expert_inputs(BF16)
    y = fp8.fp8_experts(rows, probs, offsets, fc1, fc2, *quantized(fc1, fc2))
    g = torch.randn_like(y)
    leaves = [rows, probs, *fc1, *fc2]
    got = [y, *torch.autograd.grad(y, leaves, g)]
    assert [x.dtype for x in got] == [BF16, BF16, F32] + [BF16] * 8
    exact = []
    for (i, j), w1, w2 in zip(pairwise(offsets.tolist()), fc1, fc2, strict=True):
        gate, up = (rows[i:j].double() @ w1.double().t()).chunk(2, -1)
        exact.append((F.silu(gate) * up * probs[i:j, None]) @ w2.double().t())
    exact = torch.cat(exact)
    expected = [exact, *torch.autograd.grad(exact, leaves, g.double())]
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b.double()).norm() <= 0.1 * b.double().norm()


def test_experts_add_to_gradients_that_are_given():
    rows, probs, offsets, fc1, fc2 = expert_inputs()
    weights = quantized(fc1, fc2)
    g = torch.randn(rows.shape)
    fp8.fp8_experts(rows, probs, offsets, fc1, fc2, *weights).backward(g)
    expected = [w.grad.clone() for w in fc1 + fc2]
    grads = [torch.full(w.shape, 2.0) for w in fc1 + fc2]
    fp8.fp8_experts(rows, probs, offsets, fc1, fc2, *weights, grads=grads).backward(g)
    once = [grad - 2 for grad in grads]
    near(once, expected)
    empty = 1
    assert (grads[empty] == 2).all() and (grads[4 + empty] == 2).all()


def test_no_rows():
    rows, probs, _, fc1, fc2 = expert_inputs()
    offsets = torch.zeros(len(COUNTS) + 1, dtype=torch.int64)
    none = rows.detach()[:0].requires_grad_()
    y = fp8.fp8_experts(none, probs.detach()[:0], offsets, fc1, fc2, *quantized(fc1, fc2))
    y.sum().backward()
    assert y.shape == none.grad.shape == none.shape and not fc1[0].grad.any()


def test_without_gradients_no_columns_are_written(monkeypatch):
    rows, probs, offsets, fc1, fc2 = expert_inputs()
    weights = (
        fp8.quantize_weights(fc1, parts=2, transposed=False),
        fp8.quantize_weights(fc2, transposed=False),
    )
    made = []
    for name in ("quantize", "swiglu_quantize"):
        op = getattr(fp8, name)
        spy = lambda *args, op=op: made.append(op(*args)) or made[-1]  # noqa: E731
        monkeypatch.setattr(fp8, name, spy)
    with torch.no_grad():
        y = fp8.fp8_experts(rows, probs, offsets, fc1, fc2, *weights)
        fp8.fp8_linear(rows, fc1[0], fp8.quantize_weights(fc1[:1]))
    assert len(made) == 3 and not y.requires_grad
    assert all(codes.numel() and not by_column.numel() for codes, _, by_column, _ in made)


def test_fake_tensors_of_the_671b_model():
    with FakeTensorMode():
        H, width, E, R = 7168, 2048, 32, 65_536
        rows = torch.empty(R, H, dtype=BF16, requires_grad=True)
        probs = torch.empty(R, requires_grad=True)
        fc1 = [torch.empty(2 * width, H, dtype=BF16, requires_grad=True) for _ in range(E)]
        fc2 = [torch.empty(H, width, dtype=BF16, requires_grad=True) for _ in range(E)]
        offsets = torch.empty(E + 1, dtype=torch.int64)
        y = fp8.fp8_experts(rows, probs, offsets, fc1, fc2, *quantized(fc1, fc2))
        assert y.shape == rows.shape and y.dtype == BF16
        y.sum().backward()
        assert rows.grad.shape == rows.shape and probs.grad.dtype == F32
        assert fc1[0].grad.shape == fc1[0].shape and fc2[-1].grad.dtype == BF16


def test_lost():
    x = torch.tensor([[1.0, 0.0, 1e-9, torch.nan], [2.0, 3.0, -1e-9, 0.0]])
    codes, _ = reference.quantize_rows(x)
    assert fp8.lost(x, codes).tolist() == [2, 1]


x, w, probs = torch.rand(3, 4), torch.rand(6, 4), torch.rand(3)
q = fp8.quantize_weights([w])
fc1, fc2, ends = [torch.rand(6, 4)], [torch.rand(4, 3)], torch.tensor([0, 3])
q1, q2 = fp8.quantize_weights(fc1, parts=2), fp8.quantize_weights(fc2)
REFUSALS = {
    "no weights": (lambda: fp8.quantize_weights([]), "parts must divide the 0 rows"),
    "weight shapes": (lambda: fp8.quantize_weights([w, x]), r"one shape \[N, K\], got .*\[3, 4\]"),
    "weight dtype": (lambda: fp8.quantize_weights([w.half()]), "float32 or bfloat16 of one shape"),
    "weight rank": (lambda: fp8.quantize_weights([w[0]]), r"one shape \[N, K\]"),
    "parts": (lambda: fp8.quantize_weights([w], parts=4), "parts must divide the 6 rows.*got 4"),
    "width": (lambda: fp8.fp8_linear(x[:, :3], w, q), r"x must be .*\[\.\.\., 4\], got .*\[3, 3\]"),
    "dtype": (lambda: fp8.fp8_linear(x.double(), w, q), "x must be float32 or bfloat16"),
    "rank": (lambda: fp8.fp8_linear(x[0], w, q), "x must be .*got torch.float32"),
    "probs": (
        lambda: fp8.fp8_experts(x, probs[:2], ends, fc1, fc2, q1, q2),
        r"probs float32 \[R\], got .*\[2\]",
    ),
    "parts of fc1": (
        lambda: fp8.fp8_experts(x, probs, ends, fc1, fc2, q2, q2),
        "fc1 must be E of .* in 2 parts",
    ),
    "fc2": (
        lambda: fp8.fp8_experts(x, probs, ends, fc1, fc1, q1, q2),
        r"fc2 E of \[H, I\], got .*\[6, 4\]",
    ),
    "offsets": (
        lambda: fp8.fp8_experts(x, probs, ends.int(), fc1, fc2, q1, q2),
        r"offsets must be int64 \[2\], got torch.int32",
    ),
    "device": (
        lambda: fp8.fp8_experts(x, probs, ends.to("meta"), fc1, fc2, q1, q2),
        "one device, got .*'offsets': 'meta'",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
