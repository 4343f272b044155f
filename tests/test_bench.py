"""The benchmark suite: honest figures, no figure for an op that is wrong, resuming, the CLI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch import ROOT, environment

from r1kern import cli
from r1kern.benchmarks import cases_common, harness, kernels, roofline
from r1kern.benchmarks.cases_common import Case, Inputs

CPU = torch.device("cpu")
LIMITS = harness.Limits(flops=100e12, bytes=1e12)


# ---------------------------------------------------------------------------------- the harness


def test_percentiles_by_hand():
    times = [float(us) for us in range(101)]
    assert harness.percentiles(times[::-1]) == (20.0, 50.0, 80.0)
    assert harness.percentiles([10.0, 20.0]) == (12.0, 15.0, 18.0)


def test_per_cent_of_the_limit_is_of_the_one_that_takes_longer():
    products = harness.Work(flops=50e12, bytes=0.1e12)  # 0.5 s and 0.1 s at the limits
    assert harness.bound(products, LIMITS) == "flops"
    assert harness.percent_of_limit(1e6, products, LIMITS) == pytest.approx(50)
    copy = harness.Work(flops=1e12, bytes=0.8e12)  # 0.01 s and 0.8 s
    assert harness.bound(copy, LIMITS) == "bytes"
    assert harness.percent_of_limit(2e6, copy, LIMITS) == pytest.approx(40)


def test_datasheet():
    assert harness.datasheet_limits("NVIDIA H200") == (989e12, 4.8e12)
    assert harness.datasheet_limits("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12)
    assert harness.datasheet_limits("NVIDIA H200", "fp8") == (1979e12, 4.8e12)
    assert harness.datasheet_limits("NVIDIA L40S") is None


def test_measure_rotates_its_inputs_and_sees_the_time(monkeypatch):
    seen, clock = [], iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock) * 0.5)
    timing = harness.measure(seen.append, [("a",), ("b",), ("c",)], CPU, budget_s=3.0, runs=(2, 9))
    assert timing == (5e5, 5e5, 5e5)
    assert seen == list("abcabcab")  # two to warm up, then 3 s of half a second each


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_meter_sees_a_known_allocation():
    program = """
import torch
from r1kern.benchmarks.harness import peak_memory
cpu, mib = torch.device("cpu"), 1 << 18
def passing():
    spare = torch.ones(64 * mib)
    return torch.ones(32 * mib)
torch.ones(256 * mib)  # an earlier, higher peak is not counted
print(peak_memory(lambda: torch.ones(128 * mib), cpu) / 2**20)
print(peak_memory(passing, cpu) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    held, passing = map(float, done.stdout.split())
    # The kernel counts resident pages in batches: a few hundred KiB are uncertain.
    assert (held, passing) == (pytest.approx(128, abs=2), pytest.approx(96, abs=2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_case_counts_what_its_warm_up_freed():
    shape = dict(T=8192, E=256, align=1, dtype="fp32")  # what the warm-up runs, too
    scores = 8  # MiB
    assert 2 * scores < kernels.peak_in_fresh_process("route", "torch", shape) / 2**20 < 8 * scores


# ------------------------------------------------------------------------------------ the check


def square(shape, tensors):
    (x,) = tensors
    return x * x, (x > 0).sum()


def toy(ours=square, **options) -> Case:
    def inputs(shape, device, seed):
        torch.manual_seed(seed)
        return Inputs((torch.randn(shape["n"], requires_grad=True),), (torch.ones(shape["n"]),))

    shapes = {"cpu": [dict(n=n, dtype="fp32") for n in (8, 9)]}
    return Case(
        outputs=("squares", "positive", "grad_x"),
        shapes=shapes,
        edges={"cpu": []},
        shrink=lambda shape: shape,
        inputs=inputs,
        ours=ours,
        reference=square,
        work=lambda shape: harness.Work(0, 8 * shape["n"]),
        baselines={"torch": lambda kind: square},
        trains=True,
        **options,
    )


def off_forward(shape, tensors):
    squares, positive = square(shape, tensors)
    return squares * 1.001, positive


def off_gradient(shape, tensors):
    squares, positive = square(shape, tensors)
    return squares + 0.001 * (tensors[0] - tensors[0].detach()), positive


def off_integer(shape, tensors):
    squares, positive = square(shape, tensors)
    return squares, positive + 1


def not_a_number(shape, tensors):
    squares, positive = square(shape, tensors)
    return squares * torch.nan, positive


def restless(shape, tensors):
    squares, positive = square(shape, tensors)
    return squares * (1 + 1e-3 * torch.rand(())), positive


def other_shape(shape, tensors):
    squares, positive = square(shape, tensors)
    return squares, positive[None]


def other_square(shape, tensors):
    return 2 * tensors[0] ** 2, (tensors[0] > 0).sum()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (off_forward, "squares: error"),
        (off_gradient, "grad_x: error"),
        (off_integer, "positive: 1 of 1 differ"),
        (not_a_number, "squares: two runs differ (or NaN)"),
        (restless, "squares: two runs differ"),
        (other_shape, "positive: shape [1], not []"),
    ],
)
def test_the_check_sees_every_kind_of_fault(wrong, words):
    shape = dict(n=8, dtype="fp32")
    assert cases_common.check(toy(), shape, CPU) is None
    assert words in cases_common.check(toy(wrong), shape, CPU)


def test_a_rival_that_computes_something_else_is_told():
    shape = dict(n=8, dtype="fp32")
    assert cases_common.differs(toy(), off_forward, shape, CPU) is None  # a thousandth is forgiven
    told = cases_common.differs(toy(), other_square, shape, CPU)
    assert told == "computes something else: squares is 100% away"


def test_a_drifting_machine_does_not_show_in_ratios():
    pause = iter(range(10_000))

    def slower_and_slower():
        time.sleep(2e-3 + 2e-4 * next(pause))

    once = harness.measure_in_turn([slower_and_slower] * 2, [()], CPU, runs=(30, 30))
    assert once[1].p50 / once[0].p50 < 1.6
    pause = iter(range(10_000))
    apart = [harness.measure(slower_and_slower, [()], CPU, runs=(30, 30)).p50 for _ in range(2)]
    assert apart[1] / apart[0] > 1.6


@pytest.mark.parametrize("name", [n for n, case in kernels.CASES.items() if case.shapes["cpu"]])
def test_every_case_passes_at_a_small_shape(name):
    case = kernels.CASES[name]
    shape = case.shrink(case.shapes["cpu"][0])
    small = shape | {axis: 64 for axis in ("T", "H", "V") if axis in shape}
    assert cases_common.check(case, small, CPU) is None
    assert cases_common.differs(case, case.baselines["torch"]("cpu"), small, CPU) is None


# -------------------------------------------------------------------------------------- the run


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Runs `kernels.main` on toy cases; returns (exit code, rows of the file, its table)."""
    monkeypatch.setattr(harness, "measure_limits", lambda device, precision: LIMITS)
    monkeypatch.setattr(kernels, "peak_in_fresh_process", lambda *which: 3 << 20)
    monkeypatch.setattr(kernels, "CASES", {"toy": toy(), "other": toy()})
    options = ["--device", "cpu", "--out", str(tmp_path)]

    def run(*arguments):
        code = kernels.main([*options, *arguments])
        rows = json.loads((tmp_path / "kernels_cpu.json").read_text())
        return code, rows, (tmp_path / "kernels_cpu.md").read_text()

    return run


def test_a_row_holds_its_figures_and_its_machine(suite):
    code, rows, table = suite()
    assert code == 0
    assert [(r["case"], r["shape"]) for r in rows] == [
        (case, shape) for case in ("toy", "other") for shape in ("n=8 fp32", "n=9 fp32")
    ]
    row = rows[0]
    assert row["us"] == sorted(row["us"])
    assert row["peak_mib"] == 3.0
    assert row["unit"] == "GB/s"
    us = row["us"][1]
    assert row["rate"] == pytest.approx(64 / us / 1e3, rel=0.01)
    assert row["percent_of_measured"] == pytest.approx(100 * 64e-6 / us, rel=0.01)
    rival = row["baselines"]["torch"]
    assert rival["times_ours"] > 0
    assert row["versions"]["torch"] == torch.__version__
    assert {"device", "driver", "date", "source"} <= row.keys()
    assert table.count("| toy |") == 2


def crash(shape, tensors):
    raise RuntimeError("illegal address\nand a long story")


@pytest.mark.parametrize(
    ("wrong", "words"), [(off_gradient, "grad_x: error"), (crash, "RuntimeError: illegal address")]
)
def test_an_op_that_fails_gets_no_figures(suite, monkeypatch, capsys, wrong, words):
    suite()
    monkeypatch.setitem(kernels.CASES, "toy", toy(wrong))
    code, rows, table = suite()
    assert code == 1
    assert "2 FAILED" in capsys.readouterr().out
    failed = [row for row in rows if row["case"] == "toy"]
    assert len(failed) == 2 and len(rows) == 4
    for row in failed:
        assert words in row["failed"]
        assert not {"us", "rate", "peak_mib", "baselines"} & row.keys()
    assert table.count("FAILED") == 2


def test_rivals_that_cannot_run_are_named(suite, monkeypatch):
    def missing(kind):
        raise ImportError("No module named 'liger_kernel'")

    rivals = {"missing": missing, "broken": lambda kind: crash, "wrong": lambda kind: other_square}
    monkeypatch.setitem(kernels.CASES, "toy", replace(toy(), baselines=rivals))
    code, rows, table = suite("--case", "toy")
    assert code == 0
    told = {name: rival["absent"] for name, rival in rows[0]["baselines"].items()}
    assert told["missing"] == "No module named 'liger_kernel'"
    assert told["broken"] == "RuntimeError: illegal address"
    assert told["wrong"].startswith("computes something else")
    assert "- missing: No module named 'liger_kernel'" in table


def test_resume_keeps_what_is_done(suite, monkeypatch, capsys):
    def done():
        return capsys.readouterr().out.splitlines()[-1].partition(":")[0]

    _, first, _ = suite("--case", "toy")
    assert done() == "2 rows done, 0 FAILED, 0 left"
    code, rows, _ = suite("--resume", "--seconds", "-1")
    assert (code, rows, done()) == (3, first, "0 rows done, 0 FAILED, 2 left")
    code, rows, _ = suite("--resume")
    assert (code, rows[:2], len(rows), done()) == (0, first, 4, "2 rows done, 0 FAILED, 0 left")
    suite("--case", "toy")
    assert done() == "2 rows done, 0 FAILED, 0 left"  # not asked to resume: measured again

    monkeypatch.setitem(kernels.CASES, "other", toy(off_forward))
    suite("--case", "other")
    capsys.readouterr()
    monkeypatch.setitem(kernels.CASES, "other", toy())
    assert suite("--resume")[0] == 0
    assert done() == "2 rows done, 0 FAILED, 0 left"  # a failed row is no row
    monkeypatch.setattr(kernels, "source_hash", lambda: "of other sources")
    assert len(suite("--resume")[1]) == 4
    assert done() == "4 rows done, 0 FAILED, 0 left"


# -------------------------------------------------------------------------------- command lines


def test_bench_from_end_to_end(tmp_path, capsys):
    arguments = ["bench", "--case", "advantage", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    (row,) = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert 0 < row["us"][0] <= row["us"][1] <= row["us"][2]
    assert row["baselines"]["torch"]["times_ours"] > 0
    assert "peak_mib" in row and "absent" in row["baselines"]["torch.compile"]
    assert "| advantage | N=4096 G=16 fp32 |" in (tmp_path / "kernels_cpu.md").read_text()
    assert "1 rows done, 0 FAILED" in capsys.readouterr().out


def test_bad_words_on_the_command_line(tmp_path, capfd):
    for arguments, words in (
        (["--case", "hed"], "no case 'hed': choose of head, logprob"),
        (["--device", "tpu"], "no device 'tpu': choose cpu or cuda"),
    ):
        assert cli.run(["bench", "--out", str(tmp_path / "no"), *arguments]) == 2
        assert kernels.main(["--out", str(tmp_path / "no"), *arguments]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 2 and lines[0] == lines[1] and words in lines[0]
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_that_is_not_there(capfd):
    assert kernels.main(["--device", "cuda"]) == 2
    assert "no CUDA device is seen here" in capfd.readouterr().err


def test_the_roofline_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert roofline.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("no matplotlib: pip install 'r1kern[bench]'\n")


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> calls
case "$*" in *--check*) exit "$(cat code)";; *s.kernels*) echo [] > results/kernels_x.json;; esac
"""


@pytest.mark.parametrize(("code", "measures"), [(0, True), (3, False), (1, True)])
def test_the_gpu_script_checks_then_measures(tmp_path, code, measures):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON.replace("results/", "out/"))
    python.chmod(0o755)
    (tmp_path / "code").write_text(str(code))
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh"],
        cwd=tmp_path,
        env=environment() | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "SLICE": "60"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, "")
    build, sources, *calls = Path(tmp_path / "calls").read_text().splitlines()
    assert build == "setup.py --quiet build_ext --inplace"
    assert "source_hash()" in sources
    suite = [call for call in calls if "benchmarks.kernels" in call]
    assert ["--check" in call for call in suite] == [True, False][: 1 + measures]
    assert all("--resume --seconds" in call for call in suite)
    judged = [f"-m r1kern.benchmarks.targets --out {tmp_path}/out"]
    assert calls[len(suite) :] == judged[:measures]
    assert (tmp_path / "benchmarks" / "results" / "kernels_x.json").exists() == measures


@pytest.mark.parametrize("passes", [True, False])
def test_the_gpu_script_runs_each_passed_test_once(tmp_path, passes):
    for folder in ("benchmarks", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "benchmarks")
    (tmp_path / "tests" / "test_x_gpu.py").touch()
    (tmp_path / "tests" / "test_y.py").touch()
    python = tmp_path / "python"
    word = "true" if passes else "false"
    python.write_text(f'#!/bin/sh\necho "$@" >> calls\ncase "$*" in *pytest*) {word};; esac\n')
    python.chmod(0o755)
    command, options = ["bash", "benchmarks/gpu.sh"], environment() | {"PYTHON": str(python)}
    for _ in range(2):
        assert subprocess.run(command, cwd=tmp_path, env=options).returncode == (not passes)
    calls = (tmp_path / "calls").read_text().splitlines()
    tested = [call for call in calls if "pytest" in call]
    assert tested == ["-m pytest -q -m full or not full tests/test_x_gpu.py"] * (2 - passes)
    assert sum("--check" in call for call in calls) == 2  # what fails, hinders no measurement
