"""The CUDA C++ kernels for Hopper on a GPU of capability 9.0, against float64."""

import pytest
import torch
from hopper_cases import GROUPS, gemm_case, run_gemm, run_wgrad, wgrad_case
from truth import BF16, F32, F64, assert_as_good, rms

from r1kern.kernels import fp8_gemm_hopper as hopper

if not hopper.available(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs r1kern._hopper and a GPU of capability 9.0", allow_module_level=True)

# The tensor cores keep about 14 bits of the larger of 32 products; float32 all the rest.
BOUND = 2**-9
each_group = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
each_shape = pytest.mark.parametrize(("N", "K"), [(128, 128), (256, 128), (384, 640), (512, 1920)])


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield


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
    out = torch.full((409, 256), torch.nan)
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
    table = torch.tensor([grads.data_ptr() + e * step for e in range(3)])
    hopper.grouped_wgrad(**first, grad_table=table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper.grouped_wgrad(**first, grad_table=table)
    for name in ("a_t", "a_scales", "b_t", "b_scales", "offsets"):
        first[name].copy_(second[name])
    grads.copy_(before)
    graph.replay()
    assert torch.equal(grads.to(F64), truth)
