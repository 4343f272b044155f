"""The CUDA C++ kernels for Hopper: what they compile to, their schedule, what is refused.

They are built here by setup.py, with the nvcc wheel of the lock file where it is installed, so
that the gate needs neither a GPU nor a CUDA toolkit.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r1kern.errors import UserError
from r1kern.kernels import fp8_gemm_hopper as hopper

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

BUILD = """
import sys
from distutils.core import run_setup

built = run_setup("setup.py", ["build_ext"], stop_after="commandline")
built.ext_modules = [x for x in built.ext_modules if x.name == "r1kern._hopper"]
command = built.get_command_obj("build_ext")
command.build_lib, command.build_temp = sys.argv[1:]
built.run_command("build_ext")
"""

LAUNCH = """
import sys

sys.path.insert(0, sys.argv[1])
import _hopper

sizes = dict(device=0, stream=0, offsets=0, N=128, K=128, E=1, a_scales=0, b_scales=0)
more = dict(a=0, b=0, out=0, R=128, a_scales_stride=128, out_is_float=False)
more |= dict(b_scales_expert_stride=1, b_scales_block_stride=1, b_scales_depth_stride=1)
for run, rest in (
    (_hopper.grouped_gemm, more),
    (_hopper.grouped_wgrad, dict(a_t=0, b_t=0, grads=0, P=128)),
):
    try:
        run(**sizes, **rest)
    except RuntimeError as error:
        print(error)
"""


def python(*args, cwd=ROOT, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def nvcc_wheel():
    """The CUDA folder of the nvcc wheel, {} where none is installed: setup.py looks on."""
    try:
        files = metadata.files("nvidia-cuda-nvcc")
    except metadata.PackageNotFoundError:
        return {}
    (nvcc,) = (file.locate() for file in files if file.match("bin/nvcc"))
    return {"CUDA_HOME": str(nvcc.parent.parent)}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What an nvcc on PATH has made beside `_C`, else what the wheel's makes."""
    if installed := find_spec("r1kern._hopper"):
        return Path(installed.origin)
    folder = tmp_path_factory.mktemp("hopper")
    done = python("-c", BUILD, folder / "lib", folder / "temp", **nvcc_wheel())
    built = list((folder / "lib" / "r1kern").glob("_hopper.*.so"))
    assert built, f"install the extra `dev`, or set CUDA_HOME\n{done.stdout}{done.stderr}"
    return built[0]


@pytest.fixture(scope="module")
def rows(library, tmp_path_factory):
    file = tmp_path_factory.mktemp("resources") / "rows.json"
    done = python(BENCHMARKS / "hopper_resources.py", library, "--json", file)
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


# What is compiled


def test_no_kernel_spills_and_all_are_on_tensor_cores_tma_and_roles(rows):
    assert len(rows) == 3
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert row["shared"] <= 227 * 1024, row
        assert row["qgmma"] and row["tma_loads"], row
        # One for each role, of registers that 3 warpgroups have together.
        assert row["setmaxnreg"] == 2, row
        assert row["producer"] + 2 * row["consumer"] <= 65536 // 128, row
        assert row["producer"] + 2 * row["consumer"] <= 3 * row["registers"], row
        # Four products are in flight before they are waited for: not serialised.
        assert row["qgmma"] == 4 * row["waits"], row


def test_the_committed_table_is_what_was_compiled(rows):
    """Another toolkit may choose other registers; its kernels must be the same."""
    committed = json.loads((BENCHMARKS / "results" / "hopper_resources.json").read_text())
    if {row["cuda"] for row in rows} != {row["cuda"] for row in committed}:
        rows, committed = ([row["kernel"] for row in table] for table in (rows, committed))
    assert rows == committed, "run benchmarks/hopper_resources.py"


def test_a_kernel_that_spills_or_is_serialised_is_caught(rows):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import hopper_resources
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert [hopper_resources.faults(row) for row in rows] == [[], [], []]
    sass = "QGMMA.64x8 R1 ;\nWARPGROUP.DEPBAR.LE gsb0 ;\nSTL [R1], R2 ;\nUTMALDG.2D [UR8] ;"
    row = hopper_resources.measure(" REG:168 STACK:16", sass)
    found = " ".join(hopper_resources.faults(row | {"shared": 300_000}))
    for word in ("1 LDL and STL, stack of 16", "300000", "no setmaxnreg", "serialised"):
        assert word in found


def test_it_imports_without_a_driver_and_a_launch_without_a_gpu_fails_in_one_line(library):
    done = python("-c", LAUNCH, library.parent, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    assert all(re.match(r"CUDA, choosing the device: .* \(cudaError\w+\)", x) for x in lines)


@pytest.mark.parametrize("release", [None, "12.7"])
def test_without_a_good_nvcc_it_is_left_out_in_one_line(release, tmp_path):
    if release:
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}\n")
        nvcc.chmod(0o755)
    done = python("-c", BUILD, tmp_path / "lib", tmp_path / "temp", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if "_hopper" in line]
    assert said.endswith("left out: no nvcc of CUDA 12.8 or newer in CUDA_HOME or on PATH")
    assert not list(tmp_path.rglob("*.so"))


def test_an_nvcc_that_fails_fails_no_build(tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0, V13.0\n[ $1 = --version ]\n")
    nvcc.chmod(0o755)
    done = python("-c", BUILD, tmp_path / "lib", tmp_path / "temp", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "nvcc cannot build r1kern._hopper" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


# The schedule, which is plain C++

SCHEDULE = """
#include "schedule.h"
using namespace r1kern::hopper;
extern "C" int ragged(const int* blocks, int E, int columns, int worker, int workers, int* out) {
  int expert = 0, count = 0;
  for (int i = worker; i < blocks[E] * columns; i += workers, ++count) {
    const Tile tile = ragged_tile(blocks, columns, i, expert);
    out[3 * count] = tile.expert, out[3 * count + 1] = tile.row, out[3 * count + 2] = tile.column;
  }
  return count;
}
extern "C" int even(int E, int rows, int columns, int* out) {
  for (int i = 0; i < E * rows * columns; ++i) {
    const Tile tile = even_tile(i, rows, columns);
    out[3 * i] = tile.expert, out[3 * i + 1] = tile.row, out[3 * i + 2] = tile.column;
  }
  return E * rows * columns;
}
"""


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "schedule.cpp").write_text(SCHEDULE)
    flags = ["-std=c++17", "-shared", "-fPIC", "-I", ROOT / "csrc" / "hopper"]
    built = folder / "schedule.so"
    subprocess.run(["g++", *flags, folder / "schedule.cpp", "-o", built], check=True)
    return ctypes.CDLL(str(built))


def triples(run, room):
    out = (ctypes.c_int * (3 * room + 3))()
    return [tuple(out[3 * i : 3 * i + 3]) for i in range(run(out))]


def banded(rows, columns, band=16):
    """The order of the tiles of one output: bands of rows, in a band column by column."""
    return [
        (row, column)
        for first in range(0, rows, band)
        for column in range(columns)
        for row in range(first, min(first + band, rows))
    ]


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=20),
    st.integers(1, 9),
    st.integers(1, 40),
)
@example([0, 0, 0], 3, 4)
@example([0, 0, 33, 0], 1, 132)
@example([1] * 20, 1, 1)
def test_every_ragged_tile_is_walked_once_in_banded_order(schedule, sizes, columns, workers):
    blocks = [sum(sizes[:e]) for e in range(len(sizes) + 1)]
    expected = [(e, *x) for e, rows in enumerate(sizes) for x in banded(rows, columns)]
    given_blocks = (ctypes.c_int * len(blocks))(*blocks)
    for worker in range(workers):
        walked = triples(
            lambda out, worker=worker: schedule.ragged(
                given_blocks, len(sizes), columns, worker, workers, out
            ),
            len(expected),
        )
        assert walked == expected[worker::workers]


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 9))
def test_every_even_tile_is_walked_once_in_banded_order(schedule, E, rows, columns):
    expected = [(e, *x) for e in range(E) for x in banded(rows, columns)]
    assert triples(lambda out: schedule.even(E, rows, columns, out), len(expected)) == expected


# What the launcher refuses


def operands(R=256, N=256, K=256, E=2, device="cpu"):
    scales = torch.ones(K // 128, (R + 3) // 4 * 4, device=device)[:, :R]
    return dict(
        a=torch.zeros(R, K, device=device).to(hopper.E4M3),
        a_scales=scales,
        b=torch.zeros(E, N, K, device=device).to(hopper.E4M3),
        b_scales=torch.ones(E, N // 128, K // 128, device=device),
        offsets=torch.arange(E + 1, device=device) * (R // E),
        out=torch.zeros(R, N, dtype=torch.bfloat16, device=device),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "do not run on cpu"),
        (lambda x: {"a": x["a"][:, :200]}, "K is 200|b is .* make it .* 200"),
        (lambda x: {"a": x["a"][0]}, "a has 1 dimensions: give it 2"),
        (lambda x: {"b": x["b"][:, :100]}, "N is 100: .* multiples of 128"),
        (lambda x: {"b": x["b"].float()}, "b is torch.float32"),
        (lambda x: {"a_scales": torch.ones(2, 257)[:, 1:]}, "a_scales starts|a_scales has strides"),
        (lambda x: {"a_scales": torch.ones(256, 2).T}, "a_scales has strides"),
        (lambda x: {"b_scales": x["b_scales"][:1]}, r"b_scales is .* make it .*\[2, 2, 2\]"),
        (lambda x: {"offsets": x["offsets"].int()}, "offsets is torch.int32"),
        (lambda x: {"offsets": x["offsets"][:2]}, r"offsets is .* make it torch.int64 \[3\]"),
        (lambda x: {"out": x["out"].half()}, "out is torch.float16: make it bfloat16 or float32"),
        (lambda x: {"out": x["out"].T.contiguous().T}, "out has strides"),
        (lambda x: {"b": x["b"].transpose(1, 2).contiguous().transpose(1, 2)}, "b has strides"),
    ],
)
def test_the_gemm_launcher_refuses_in_one_line(change, message):
    given_operands = operands()
    given_operands |= change(given_operands)
    with pytest.raises(UserError, match=message) as caught:
        hopper.grouped_gemm(**given_operands)
    assert "\n" not in str(caught.value)


def test_the_wgrad_launcher_refuses_in_one_line():
    N, K, P = 128, 256, 384
    codes = lambda *shape: torch.zeros(shape).to(hopper.E4M3)  # noqa: E731
    scales = torch.ones(3, N), torch.ones(3, K)
    offsets, table = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    arguments = [codes(N, P), scales[0], codes(K, P), scales[1], offsets, table, N, K]
    for at, wrong, message in (
        (0, codes(N, P - 1), "P is 383: .* multiples of 128"),
        (1, scales[0].T, r"a_scales is .* make it torch.float32 \[3, 128\]"),
        (2, codes(P, K).T, "b_t has strides"),
        (4, offsets[:2], r"offsets is .* make it torch.int64 \[3\]"),
        (5, table[:0], r"offsets is .* make it torch.int64 \[1\]"),
        (6, 100, "N is 100"),
        (7, 256, "do not run on cpu"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            hopper.grouped_wgrad(*arguments[:at], wrong, *arguments[at + 1 :])
        assert "\n" not in str(caught.value)


def test_nothing_to_do_needs_no_gpu():
    hopper.grouped_gemm(**operands(R=0))
    none = torch.zeros(128, 0).to(hopper.E4M3), torch.zeros(0, 128)
    offsets, table = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    hopper.grouped_wgrad(*none, *none, offsets, table, 128, 128)


def test_it_is_not_available_on_cpu():
    assert not hopper.available(torch.device("cpu"))
