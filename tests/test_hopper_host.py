"""The CUDA C++ kernels for Hopper run on the host: their own source, all but the instructions.

`hopper_host/` stands in for CUDA: threads that take turns at random, mbarriers, a copy engine that
swizzles and lands late, wgmma that reads shared memory by descriptors.  So the ring, the roles, the
tiles, the scales and the edges are tested without a GPU; what the hardware does of an instruction
is tested by `test_hopper_gpu.py` where there is one.
"""

import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch
from hopper_cases import GROUPS, gemm_case, run_gemm, run_wgrad, wgrad_case
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import BF16, F32, F64, assert_as_good

from r1kern.kernels import fp8_gemm_hopper as hopper

HOST = Path(__file__).parent / "hopper_host"
SOURCE = Path(__file__).parents[1] / "csrc" / "hopper"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# An address that is not aligned for its type, or an index beyond an array, ends the process.
FLAGS += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]


def build(folder, changes=()):
    """The module from the sources in which each (file, old, new) of `changes` is replaced."""
    for file in [*SOURCE.iterdir(), *HOST.iterdir()]:  # HOST's ptx.cuh takes the other's place
        text = file.read_text()
        for name, old, new in changes:
            if file == SOURCE / name:
                assert text.count(old) == 1, (name, old)
                text = text.replace(old, new)
        (folder / file.name).write_text(text)
    include = ["-I", folder, "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    parts = [folder / name for name in ("gemm.cu", "wgrad.cu", "launch.cu", "binding.cpp")]

    def compiled(part):
        level = "-O0" if part.suffix == ".cpp" else "-O2"
        command = ["g++", *FLAGS, level, *include, "-x", "c++", "-c", part]
        done = subprocess.run(
            [*command, "-o", part.with_suffix(".o")], capture_output=True, text=True
        )
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
        return part.with_suffix(".o")

    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(compiled, parts)]
    built = folder / "_hopper.so"
    subprocess.run(["g++", "-shared", *objects, "-o", built], check=True)
    spec = importlib.util.spec_from_file_location("_hopper", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"))


@pytest.fixture
def host(module, monkeypatch):
    use(module, monkeypatch)


def use(module, monkeypatch, blocks=3, seed=0):
    """The launcher's checks and arguments as they are; what it launches runs here."""

    def launch(name, device, **arguments):
        getattr(module, name)(device=0, stream=0, **arguments)

    monkeypatch.setattr(hopper, "_launch", launch)
    monkeypatch.setenv("HOST_BLOCKS", str(blocks))
    monkeypatch.setenv("HOST_SEED", str(seed))


# A ring of four stages is passed more than once; a tile's right half lies beyond N, beyond K.
SHAPES = {"many experts": (128, 128), "bands": (128, 256)}


def each_of(*names):
    made = [(GROUPS[name], *SHAPES.get(name, (384, 640))) for name in names]
    return pytest.mark.parametrize(("sizes", "N", "K"), made, ids=names)


@each_of(*GROUPS)
def test_the_gemm_is_exact_where_nothing_is_rounded(host, sizes, N, K):
    operands, truth = gemm_case(sizes, N, K, exact=True)
    assert torch.equal(run_gemm(operands, truth, F32).to(F64), truth)


@each_of("ragged", "one-hot", "empty", "many experts")
def test_the_wgrad_is_exact_where_nothing_is_rounded(host, sizes, N, K):
    operands, before, truth = wgrad_case(sizes, N, K, exact=True)
    assert torch.equal(run_wgrad(operands, before).to(F64), truth)


def test_bfloat16_is_rounded_once(host):
    operands, truth = gemm_case([130, 0, 7], 384, 256, exact=False)
    assert_as_good([run_gemm(operands, truth, BF16)], [truth.to(BF16)], [truth])
    operands, truth = gemm_case([130, 0, 7], 384, 256, exact=True)
    assert torch.equal(run_gemm(operands, truth, BF16), truth.to(BF16))


def test_the_gemm_takes_the_scales_of_the_transposed_weight(host):
    operands, truth = gemm_case([33, 7], 256, 384, exact=True)
    turned = operands["b_scales"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    got = run_gemm(operands | {"b_scales": turned}, truth, F32)
    assert torch.equal(got.to(F64), truth)


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_no_order_of_threads_and_copies_changes_a_result(module, sizes, N, K, workers, seed):
    with pytest.MonkeyPatch.context() as patch:
        use(module, patch, workers, seed)
        operands, truth = gemm_case(sizes, 128 * N, 128 * K, exact=True)
        assert torch.equal(run_gemm(operands, truth, F32).to(F64), truth)
        operands, before, truth = wgrad_case(sizes, 128 * N, 128 * K, exact=True)
        assert torch.equal(run_wgrad(operands, before).to(F64), truth)


# What would go wrong on a GPU now and then goes wrong here.
FAULTS = {
    "a stage is filled before it is free": ("pipeline.cuh", "slot.parity ^ 1);", "slot.parity);"),
    "a stage is free before all warps have read it": (
        "pipeline.cuh", "CONSUMERS * WARPGROUP / 32", "CONSUMERS"),
    "a lane still reads what its warp has released": ("pipeline.cuh", "  __syncwarp();\n", ""),
    "the scales are not waited for": (
        "pipeline.cuh", "4 * (A_SCALES + B_SCALES)", "4 * A_SCALES"),
    "the second half is multiplied after the release": (
        "gemm.cu",
        "multiply(part, a, b + B_BYTES / 2);\n      release(shared, slot);",
        "release(shared, slot);\n      multiply(part, a, b + B_BYTES / 2);"),
    "the copies are not swizzled": (
        "launch.cu", "strides, box,\n                CU_TENSOR_MAP_SWIZZLE_128B",
        "strides, box,\n                CU_TENSOR_MAP_SWIZZLE_NONE"),
    "rows of 8 lie elsewhere": ("pipeline.cuh", "(1024ull >> 4)", "(512ull >> 4)"),
    "products are read before they are done": ("pipeline.cuh", "  ptx::wgmma_wait(part);\n", ""),
    "columns beyond N are written": ("gemm.cu", "lower, r < end && wide);", "lower, r < end);"),
    "rows of the next expert are written": ("gemm.cu", "lower, r < end);", "lower, true);"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(change, monkeypatch, tmp_path):
    use(build(tmp_path, [change]), monkeypatch)
    wrong = 0
    for seed in range(4):
        monkeypatch.setenv("HOST_SEED", str(seed))
        operands, truth = gemm_case([130, 0, 7, 200], 384, 640, exact=True)
        more, before, gradient = wgrad_case([130, 0, 7, 200], 384, 640, exact=True)
        try:
            assert torch.equal(run_gemm(operands, truth, F32).to(F64), truth)
            assert torch.equal(run_wgrad(more, before).to(F64), gradient)
        except (AssertionError, RuntimeError):
            wrong += 1
    assert wrong
