"""The CUDA C++ kernels for Hopper on a GPU of capability 9.0, against float64.

Where operands are small integers and scales powers of two, nothing is rounded anywhere: sums of 128
products fit the tensor cores' accumulators, and the results must be the truth bit for bit.
"""

import pytest
import torch
from truth import BF16, F32, F64, assert_as_good, rms

from r1kern.kernels import fp8_gemm_hopper as hopper

if not hopper.available(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs r1kern._hopper and a GPU of capability 9.0", allow_module_level=True)

NAN = 0x7F  # the code of e4m3 that is no number
# The tensor cores keep about 14 bits of the larger of 32 products; float32 all the rest.
BOUND = 2**-9
GROUPS = {
    "ragged": [5, 0, 131, 128, 1, 300, 0],
    "one row each": [1, 1, 1, 1],
    "one-hot": [0, 0, 517, 0],
    "dense": [640],
    "dense, one row": [1],
    "empty": [0, 0, 0],
    "many experts": [(7 * e) % 13 * (e % 3 == 0) for e in range(256)],
    "bands": [128 * 35 + 7, 64],
}
SHAPES = [(128, 128), (256, 128), (384, 640), (512, 1920)]
each_group = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
each_shape = pytest.mark.parametrize(("N", "K"), SHAPES)


def offsets_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def codes(exact, *shape):
    x = torch.randint(-2, 3, shape).float() if exact else torch.randn(shape) * 30
    return x.to(hopper.E4M3).cuda()


def scales(exact, *shape):
    x = torch.randint(-1, 2, shape).float().exp2() if exact else torch.rand(shape) + 0.5
    return x.cuda()


def nan_codes(x, where):
    x.view(torch.uint8)[where] = NAN


def padded_scales(x):
    """[KB, R] in rows of a multiple of 4, and of NaN behind R."""
    KB, R = x.shape
    out = torch.full((KB, (R + 7) // 4 * 4), torch.nan, device=x.device)[:, :R]
    return out.copy_(x)


def blocks(x, dims):
    for dim in dims:
        x = x.repeat_interleave(128, dim)
    return x


def gemm_case(sizes, N, K, exact, behind=9):
    """Operands with `behind` rows of NaN behind the last expert's, and the float64 truth."""
    torch.manual_seed(0)
    offsets, E = offsets_of(sizes), len(sizes)
    R = int(offsets[-1]) + behind
    a, b = codes(exact, R, K), codes(exact, E, N, K)
    a_scales, b_scales = scales(exact, K // 128, R), scales(exact, E, N // 128, K // 128)
    nan_codes(a, slice(R - behind, R))
    a_scales[:, R - behind :] = torch.nan
    rows = a.to(F64) * blocks(a_scales.to(F64).T, [1])
    weights = b.to(F64) * blocks(b_scales.to(F64), [1, 2])
    parts = zip(rows[: R - behind].split(list(sizes)), weights, strict=True)
    truth = torch.cat([part @ weight.T for part, weight in parts])
    return dict(a=a, a_scales=padded_scales(a_scales), b=b, b_scales=b_scales,
                offsets=offsets.cuda()), truth  # fmt: skip


def run_gemm(operands, truth, dtype):
    """The rows of the experts; all around them must stay as it was."""
    R, N = operands["a"].shape[0], operands["b"].shape[1]
    memory = torch.full((R + 256, N), torch.nan, dtype=dtype, device="cuda")
    hopper.grouped_gemm(**operands, out=memory[128 : 128 + R])
    live = slice(128, 128 + len(truth))
    got = memory[live].clone()
    memory[live] = torch.nan
    assert memory.isnan().all()
    return got


@each_group
@each_shape
def test_the_gemm_is_exact_where_nothing_is_rounded(sizes, N, K):
    operands, truth = gemm_case(sizes, N, K, exact=True)
    assert torch.equal(run_gemm(operands, truth, F32).to(F64), truth)
    assert torch.equal(run_gemm(operands, truth, BF16), truth.to(BF16))


@each_group
@each_shape
def test_the_gemm_is_near_float64(sizes, N, K):
    operands, truth = gemm_case(sizes, N, K, exact=False)
    if not len(truth):
        return
    assert rms(run_gemm(operands, truth, F32) - truth) <= BOUND * rms(truth)
    assert_as_good([run_gemm(operands, truth, BF16)], [truth.to(BF16)], [truth])


def test_a_wrong_scale_of_one_block_is_beyond_the_bound():
    operands, truth = gemm_case([200], 256, 640, exact=False)
    operands["b_scales"][0, 1, 3] *= 1.1
    assert rms(run_gemm(operands, truth, F32) - truth) > BOUND * rms(truth)


def test_the_gemm_takes_the_scales_of_the_transposed_weight():
    operands, truth = gemm_case([130, 0, 70], 384, 640, exact=True)
    turned = operands["b_scales"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    got = run_gemm(operands | {"b_scales": turned}, truth, F32)
    assert torch.equal(got.to(F64), truth)


def test_large_gemms_are_exact_every_time():
    """Many tiles a block of threads, many rounds of the ring: a race would show."""
    torch.manual_seed(1)
    sizes = torch.randint(0, 1500, (16,)).tolist()
    operands, truth = gemm_case(sizes, 2048, 1024, exact=True)
    for _ in range(20):
        assert torch.equal(run_gemm(operands, truth, F32).to(F64), truth)


def test_a_captured_gemm_follows_the_sizes_on_the_device():
    first, _ = gemm_case([100, 300, 0], 256, 256, exact=True)
    second, truth = gemm_case([0, 17, 383], 256, 256, exact=True)
    out = torch.full((409, 256), torch.nan, device="cuda")
    hopper.grouped_gemm(**first, out=out)  # whatever is set up once, is
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper.grouped_gemm(**first, out=out)
    for name, x in second.items():
        first[name].copy_(x)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out[:400].to(F64), truth)
    assert out[400:].isnan().all()


# The weight gradient


def wgrad_case(sizes, N, K, exact, behind=256):
    """Operands padded per expert, NaN behind the last; gradients that hold something before."""
    torch.manual_seed(0)
    offsets, E = offsets_of(sizes), len(sizes)
    counts = torch.tensor(sizes)
    starts = offsets_of((counts + 127) // 128 * 128)
    P = int(starts[-1]) + behind
    a, b = codes(exact, N, P), codes(exact, K, P)
    a_scales, b_scales = scales(exact, P // 128, N), scales(exact, P // 128, K)
    for e in range(E):
        tail = slice(int(starts[e] + counts[e]), int(starts[e + 1]))
        a.view(torch.uint8)[:, tail] = 0
        b.view(torch.uint8)[:, tail] = 0
    for x, x_scales in ((a, a_scales), (b, b_scales)):
        nan_codes(x, (slice(None), slice(P - behind, P)))
        x_scales[(P - behind) // 128 :] = torch.nan
    before = torch.randint(-9, 10, (E, N, K)).float().cuda()
    left = a.to(F64) * blocks(a_scales.to(F64), [0]).T
    right = b.to(F64) * blocks(b_scales.to(F64), [0]).T
    truth = before.to(F64)
    for e in range(E):
        live = slice(int(starts[e]), int(starts[e + 1]))
        truth[e] += left[:, live] @ right[:, live].T
    operands = dict(a_t=a, a_scales=a_scales, b_t=b, b_scales=b_scales,
                    offsets=offsets.cuda(), N=N, K=K)  # fmt: skip
    return operands, before, truth


def run_wgrad(operands, before):
    """Each expert's gradient is an allocation of its own, with NaN around it."""
    memory = [torch.full((x.numel() + 64,), torch.nan, device="cuda") for x in before]
    grads = [x[32:-32].view(before[0].shape) for x in memory]
    for grad, x in zip(grads, before, strict=True):
        grad.copy_(x)
    table = torch.tensor([x.data_ptr() for x in grads]).cuda()
    hopper.grouped_wgrad(**operands, grad_table=table)
    assert all(x[:32].isnan().all() and x[-32:].isnan().all() for x in memory)
    return torch.stack(grads)


@each_group
@each_shape
def test_the_wgrad_is_exact_where_nothing_is_rounded(sizes, N, K):
    operands, before, truth = wgrad_case(sizes, N, K, exact=True)
    assert torch.equal(run_wgrad(operands, before).to(F64), truth)


@each_group
@each_shape
def test_the_wgrad_is_near_float64(sizes, N, K):
    operands, before, truth = wgrad_case(sizes, N, K, exact=False)
    got = run_wgrad(operands, before)
    for e, size in enumerate(sizes):
        if size:
            assert rms(got[e] - truth[e]) <= BOUND * rms(truth[e] - before[e])
        else:
            assert torch.equal(got[e], before[e])


def test_large_wgrads_are_exact_every_time():
    torch.manual_seed(1)
    sizes = torch.randint(0, 900, (8,)).tolist()
    operands, before, truth = wgrad_case(sizes, 1024, 1280, exact=True)
    for _ in range(20):
        assert torch.equal(run_wgrad(operands, before).to(F64), truth)


def test_a_captured_wgrad_follows_the_sizes_on_the_device():
    first, before, _ = wgrad_case([100, 300, 0], 256, 128, exact=True)
    second, _, truth = wgrad_case([0, 17, 383], 256, 128, exact=True)
    grads = before.clone()
    step = grads.stride(0) * 4
    table = torch.tensor([grads.data_ptr() + e * step for e in range(3)]).cuda()
    hopper.grouped_wgrad(**first, grad_table=table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper.grouped_wgrad(**first, grad_table=table)
    for name in ("a_t", "a_scales", "b_t", "b_scales", "offsets"):
        first[name].copy_(second[name])
    grads.copy_(before)
    graph.replay()
    assert torch.equal(grads.to(F64), truth)
