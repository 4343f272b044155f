"""Every Triton kernel compiles for Hopper on this machine: no spills, wgmma and TMA where they pay.

The gate runs in processes of its own: one that has run Triton's interpreter compiles no more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

GREEDY = """
import triton
import triton.language as tl


@triton.jit
def greedy(x, y):
    at = tl.arange(0, 64)[:, None] * 1024 + tl.arange(0, 1024)[None, :]
    a = tl.load(x + at)
    tl.debug_barrier()
    tl.store(y + at, tl.cumsum(a, 0) * a)


if __name__ == "__main__":
    import codegen

    row = codegen.measure(greedy, dict(x="*fp32", y="*fp32"), {}, dict(num_warps=4), {"x", "y"})
    print(*codegen.faults(row))
"""


def python(*args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *sys.path])
    return subprocess.run(
        [sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("codegen") / "codegen.json"
    done = python(BENCHMARKS / "codegen.py", "--json", file)
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


def test_no_kernel_spills_or_asks_for_too_much(rows):
    for row in rows:
        assert row["spill"] == row["stack"] == 0, row
        assert row["shared"] <= 227 * 1024, row


def test_the_head_is_on_tensor_cores_and_tma(rows):
    heads = [row for row in rows if row["kernel"] == "head.head"]
    for tile in ("wide", "square", "thin"):
        assert any(row["configuration"].startswith(f"{tile} bf16") for row in heads)
    for row in heads:
        assert row["tma_loads"], row
        assert bool(row["wgmma"]) != row["configuration"].startswith("exact"), row


def test_the_fp8_products_are_on_fp8_tensor_cores_and_tma(rows):
    products = [row for row in rows if row["kernel"].startswith("fp8_gemm.")]
    assert {row["kernel"] for row in products} == {"fp8_gemm.gemm", "fp8_gemm.wgrad"}
    for row in products:
        assert row["tma_loads"] and row["qgmma"] and row["qgmma"] == row["wgmma"], row


def test_the_committed_table_has_these_rows(rows):
    """For every version of Triton in it; a change in `variants()` calls for a new table."""
    committed = json.loads((BENCHMARKS / "results" / "codegen.json").read_text())
    compiled = {(row["kernel"], row["configuration"]) for row in rows}
    versions = {row["triton"] for row in committed}
    assert {"3.6.0", "3.9.0"} <= versions
    for version in versions:
        known = {(r["kernel"], r["configuration"]) for r in committed if r["triton"] == version}
        assert known == compiled, f"run benchmarks/codegen.py with Triton {version}"


def test_a_kernel_that_spills_is_caught(tmp_path):
    file = tmp_path / "greedy.py"
    file.write_text(GREEDY)
    done = python(file)
    assert "spills" in done.stdout, done.stdout + done.stderr
