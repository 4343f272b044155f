"""The Triton kernels of router, permutation and advantages, in Triton's interpreter on the CPU."""

import importlib.util
import sys

import pytest
import torch
from interpreter import interpreted

from r1kern.errors import UserError
from r1kern.kernels import reference

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

PROBE = """
import triton
import triton.language as tl

@triton.jit
def cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))

@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, tl.where(a > b, a * b + a, a - b))

@triton.jit
def dot(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + i, tl.dot(tl.load(x + i), tl.load(y + i)))
"""


@pytest.fixture(scope="module")
def route_module():
    with interpreted("route_triton") as module:
        yield module


@pytest.fixture(scope="module")
def permute_module():
    with interpreted("permute_triton") as module:
        yield module


@pytest.fixture(scope="module")
def advantage_module():
    with interpreted("advantage_triton") as module:
        yield module


def random(seed, *shape, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(x):
    return x.double().square().mean().sqrt()


# ---------------------------------------------------------------------------- the interpreter


@pytest.fixture
def probe(tmp_path, monkeypatch):
    (tmp_path / "kernel_probes").mkdir()
    (tmp_path / "kernel_probes" / "probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "kernel_probes.probe"
    sys.modules.pop("kernel_probes", None)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


@pytest.mark.parametrize("dtype", [BF16, F16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_interpreter_casts(probe, dtype):
    x = random(0, 4096) * 50
    x[:8] = torch.tensor([448.0, -448.0, 31.7, 2**-9, 2**-10, 1e-12, 0.0, -0.0])
    y = torch.empty(4096, dtype=dtype)
    with interpreted(probe) as module:
        module.cast[(1,)](x, y, 4096)
        assert torch.equal(bits(y), bits(x.to(dtype)))
        back = torch.empty_like(x)
        module.cast[(1,)](y, back, 4096)
    assert torch.equal(back, y.float())


def test_interpreter_bf16(probe):
    x, y = random(1, 256, dtype=BF16), random(2, 256, dtype=BF16)
    expected = torch.where(x > y, x * y + x, x - y)
    product = x.view(16, 16).float() @ y.view(16, 16).float()

    def run(mend):
        out, dotted = torch.empty_like(x), torch.empty(16, 16)
        with interpreted(probe, mend=mend) as module:
            module.arithmetic[(1,)](x, y, out, 256)
            module.dot[(1,)](x, y, dotted, 16)
        return out, dotted

    out, dotted = run(mend=True)
    assert torch.equal(out, expected)
    torch.testing.assert_close(dotted, product)
    out, dotted = run(mend=False)
    assert not torch.equal(out, expected)
    assert rms(dotted - product) > rms(product)


def test_interpreter_leaves_no_trace(probe):
    import triton

    with interpreted(probe) as module:
        assert "Interpreted" in type(module.cast).__name__
        assert not triton.knobs.runtime.interpret
    with interpreted(probe, mend=False):
        pass
    spec = importlib.util.find_spec(probe)
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    assert isinstance(compiled.cast, triton.JITFunction)
    assert triton.language.core.is_builtin(triton.language.core.load)
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        triton.language.sum(1)


# ---------------------------------------------------------------------------- route


def layout(indices, E, align):
    """counts, offsets, slots, order of the experts [T, K], counted naively."""
    T, K = indices.shape
    counts = torch.bincount(indices.flatten(), minlength=E)
    offsets = [0]
    for count in counts.tolist():
        offsets.append(offsets[-1] + -(-count // align) * align)
    R = T * K if align == 1 else (T * K + E * (align - 1)) // align * align
    slots, order = torch.empty(T, K, dtype=torch.int32), torch.full((R,), -1, dtype=torch.int32)
    free = offsets[:]
    for t in range(T):
        for k in range(K):
            e = int(indices[t, k])
            slots[t, k], order[free[e]] = free[e], t * K + k
            free[e] += 1
    return counts, torch.tensor(offsets), slots, order


def check_route(module, logits, bias, G, topk_groups, K, align=1, normalize=True, programs=1):
    got = module.route(logits, bias, G, topk_groups, K, 2.5, normalize, align, programs)
    weights, indices, *metadata, score_sums = got
    options = dict(num_groups=G, topk_groups=topk_groups, topk=K, scale=2.5, normalize=normalize)
    expected, true_weights, *_ = reference.route(logits.float(), bias, **options)[:3]
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, true_weights, rtol=2e-6, atol=0)
    for x, y in zip(metadata, layout(indices, logits.shape[1], align), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    s = logits.double().sigmoid()
    sums = (s / s.sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close(score_sums.double(), sums, rtol=1e-5, atol=0)


SHAPES = [  # T, E, groups, topk_groups, K
    (70, 256, 8, 4, 8),
    (33, 64, 1, 1, 6),
    (45, 12, 3, 2, 4),
    (40, 20, 4, 2, 3),
    (1, 256, 8, 4, 8),
    (9, 8, 8, 8, 1),
    (5, 16, 1, 1, 16),
]


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize(("T", "E", "G", "topk_groups", "K"), SHAPES)
def test_route(route_module, poisoned, T, E, G, topk_groups, K, align):
    check_route(route_module, random(3, T, E), random(4, E) * 0.1, G, topk_groups, K, align)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_route_of_half_precision(route_module, poisoned, dtype):
    logits = random(5, 40, 64, dtype=dtype)  # of a few hundred values: many ties
    check_route(route_module, logits, torch.zeros(64), 8, 3, 6, normalize=False)


def test_route_ties_go_to_the_lowest_index(route_module, poisoned):
    logits = torch.randint(-1, 2, (50, 32), generator=torch.Generator().manual_seed(6)).float()
    check_route(route_module, logits, torch.zeros(32), 8, 3, 7, align=4)
    check_route(route_module, torch.zeros(3, 32), torch.zeros(32), 8, 3, 7, align=4)


def test_route_bias_selects_and_never_weighs(route_module, poisoned):
    bias = torch.full((16,), -torch.inf)
    bias[3:8] = torch.tensor([1e6, 0.0, 5.0, -5.0, 1e6])
    check_route(route_module, random(7, 20, 16), bias, 1, 1, 5)


def test_route_of_no_tokens(route_module, poisoned):
    for align in (1, 8):
        check_route(route_module, torch.empty(0, 16), torch.zeros(16), 4, 2, 3, align)


def test_route_of_strided_logits(route_module, poisoned):
    check_route(route_module, random(8, 32, 40).T, random(9, 64)[::2], 4, 2, 3)


def test_route_refuses(route_module):
    def refused(logits, topk, message):
        with pytest.raises(UserError, match=message):
            route_module.route(logits, torch.zeros(logits.shape[1]), 1, 1, topk, 1.0, True, 1, 1)

    refused(torch.zeros(2, 32, dtype=F64), 2, "float64")
    refused(torch.zeros(2, 32), 17, "topk up to 16")
    refused(torch.zeros(2, 5000), 2, "5000")


class Twice:
    """Launches a kernel twice.  The interpreter runs programs one after another, none waiting for
    those to come: of two launches over the same tables the second finds them complete."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            args[self.kernel.arg_names.index("count_table")].zero_()
            self.kernel[grid](*args, **kwargs)
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize(("T", "programs"), [(100, 3), (33, 2)])
def test_route_of_many_programs(route_module, poisoned, monkeypatch, T, programs):
    monkeypatch.setattr(route_module, "_wait_for_all", lambda arrived: None)
    monkeypatch.setattr(route_module, "_route_kernel", Twice(route_module._route_kernel))
    check_route(route_module, random(10, T, 64), random(11, 64), 8, 4, 8, programs=programs)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("parts", ["weights", "sums", "both"])
@pytest.mark.parametrize(
    ("T", "E", "K", "dtype"), [(70, 256, 8, F32), (7, 12, 3, BF16), (1, 8, 1, F16)]
)
def test_route_backward(route_module, poisoned, T, E, K, dtype, parts, normalize):
    logits = random(12, T, E, dtype=dtype)
    grad_weights = random(13, K, T).T if parts != "sums" else None
    grad_sums = random(14, E) if parts != "weights" else None
    indices = logits.float().topk(K).indices

    x = logits.double().requires_grad_()
    s = x.sigmoid()
    w = s.gather(1, indices)
    w = 2.5 * (w / (w.sum(1, keepdim=True) + 1e-20) if normalize else w)
    value = 0
    if grad_weights is not None:
        value = value + (w * grad_weights).sum()
    if grad_sums is not None:
        value = value + ((s / s.sum(1, keepdim=True)).sum(0) * grad_sums).sum()
    (truth,) = torch.autograd.grad(value, x)

    grad = route_module.route_backward(logits, indices, grad_weights, grad_sums, 2.5, normalize)
    assert grad.dtype == dtype
    rtol = 2 * max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(grad.double(), truth, rtol=rtol, atol=1e-6)
    if parts == "weights":
        mask = torch.ones(T, E, dtype=torch.bool).scatter_(1, indices, False)
        assert (grad[mask] == 0).all()


# ---------------------------------------------------------------------------- permute


def assignment(seed, T, K, align, E=6):
    """slots of T tokens to K of E experts each, and R."""
    indices = random(seed, T, E).topk(K).indices
    _, _, slots, order = layout(indices, E, align)
    return slots, len(order)


CASES = [(37, 3, 100, 1), (37, 3, 1030, 8), (1, 1, 7168, 1), (5, 6, 1, 4), (0, 2, 64, 8)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("T", "K", "H", "align"), CASES)
def test_permute(permute_module, poisoned, T, K, H, align, dtype):
    slots, R = assignment(15, T, K, align)
    x = random(16, H, T, dtype=dtype).T
    expected = torch.zeros(R, H, dtype=dtype)
    expected[slots.flatten().long()] = x.repeat_interleave(K, 0)
    assert torch.equal(permute_module.permute(x, slots, R), expected)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("T", "K", "H", "align"), CASES)
def test_unpermute(permute_module, poisoned, T, K, H, align, dtype, weighted):
    slots, R = assignment(17, T, K, align)
    rows, weights = random(18, R, H, dtype=dtype), random(19, T, K) if weighted else None
    expected = torch.zeros(T, H)
    for k in range(K):
        row = rows[slots[:, k].long()].float()
        expected += row if weights is None else weights[:, k, None] * row
    assert torch.equal(permute_module.unpermute(rows, slots, weights), expected.to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("T", "K", "H", "align"), CASES)
def test_unpermute_backward(permute_module, poisoned, T, K, H, align, dtype):
    slots, R = assignment(20, T, K, align)
    index = slots.flatten().long()
    rows, weights = random(21, R, H, dtype=dtype), random(22, T, K)
    grad = random(23, T, H, dtype=dtype)
    expected = torch.zeros(R, H)
    expected[index] = (weights[..., None] * grad[:, None]).view(-1, H)
    truth = (grad[:, None].double() * rows[index].view(T, K, H).double()).sum(2)
    grad_rows, grad_weights = permute_module.unpermute_backward(grad, rows, slots, weights)
    assert torch.equal(grad_rows, expected.to(dtype))
    assert grad_weights.dtype == F32
    torch.testing.assert_close(grad_weights.double(), truth, rtol=1e-5, atol=1e-5 * H**0.5)


def test_unpermute_refuses(permute_module):
    rows, slots = torch.zeros(2, 4, dtype=F64), torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(UserError, match="float64"):
        permute_module.unpermute(rows, slots, None)
    with pytest.raises(UserError, match="float64"):
        permute_module.unpermute_backward(rows, rows, slots, torch.zeros(2, 1))


# ---------------------------------------------------------------------------- advantage


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize(("N", "dtype"), [(150, F64), (37, F32), (20, BF16), (1, F64), (0, F32)])
def test_group_advantage(advantage_module, poisoned, N, dtype, std):
    generator = torch.Generator().manual_seed(24)
    ids = torch.randint(-5, 5 + N // 4, (N,), generator=generator)
    rewards = (torch.randn(N, generator=generator).mul(3).round() / 3 + 1e3).to(dtype)
    got, flat = advantage_module.group_advantage(rewards, ids, std, 1e-6)
    truth = reference.group_advantage(rewards.double(), ids, std=std, eps=1e-6)
    rtol = max(torch.finfo(dtype).eps, 1e-9)
    assert got.dtype == dtype and flat.dtype == torch.bool
    torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=1e-9)
    equal = torch.tensor([len(rewards[ids == i].unique()) == 1 for i in ids], dtype=torch.bool)
    assert torch.equal(flat, equal)
    assert (got[flat] == 0).all()


def test_group_advantage_of_strided_int32(advantage_module, poisoned):
    rewards, ids = random(25, 30)[::2], torch.arange(30, dtype=torch.int32)[::2] // 8
    got, _ = advantage_module.group_advantage(rewards, ids, "population", 1e-6)
    truth = reference.group_advantage(rewards.double(), ids)
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6)


def test_group_advantage_of_nearly_equal_rewards(advantage_module, poisoned):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1 + 1e-12, 5e-324, 0.0], dtype=F64)
    ids = torch.tensor([1, 1, 1, 2, 3, 3])
    got, flat = advantage_module.group_advantage(rewards, ids, "population", 0.0)
    assert flat.tolist() == [True, True, True, True, False, False]
    assert got.isfinite().all() and (got == 0).all()
