"""The benchmark suite: every op checked against its reference, then timed beside its rivals.

    python -m r1kern.benchmarks.kernels --device cuda --resume --seconds 500
    python -m r1kern.benchmarks.kernels --check

An op whose check fails gets neither a time nor a ratio: its row says FAILED, and the run ends with
exit code 1.  The file (`kernels_<device>.json` and `.md`) is written after every row, so that a run
that was stopped goes on with `--resume` where it was; rows of other sources are measured again.
Needs torch and triton; the baselines Liger and Megatron are measured where they are installed and
named as absent where they are not.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from r1kern import ops
from r1kern.benchmarks import (
    cases_fp8,
    cases_fp8_experts,
    cases_fp8_gemm,
    cases_head,
    cases_moe,
    harness,
    table,
)
from r1kern.benchmarks.cases_common import (
    Case,
    Forward,
    Prepared,
    Shape,
    Tensors,
    differs,
    label,
    ready,
)
from r1kern.benchmarks.cases_common import check as check_case
from r1kern.errors import UserError
from r1kern.kernels import reference

CASES: dict[str, Case] = {
    "head": cases_head.HEAD,
    "logprob": cases_head.LOGPROB,
    "logprob+backward": cases_head.LOGPROB_BACKWARD,
    "advantage": cases_head.ADVANTAGE,
    "grpo_loss": cases_head.LOSS,
    "route": cases_moe.ROUTE,
    "permute": cases_moe.PERMUTE,
    "unpermute": cases_moe.UNPERMUTE,
    "route+permute": cases_moe.ROUTE_PERMUTE,
    "fp8_quantize": cases_fp8.QUANTIZE,
    "fp8_quantize_weights": cases_fp8.QUANTIZE_WEIGHTS,
    "fp8_swiglu": cases_fp8.SWIGLU,
    "fp8_swiglu_backward": cases_fp8.SWIGLU_BACKWARD,
    "fp8_gemm": cases_fp8_gemm.GEMM,
    "fp8_grouped_gemm": cases_fp8_gemm.GROUPED_GEMM,
    "fp8_gemm_triton": cases_fp8_gemm.GEMM_TRITON,
    "fp8_gemm_hopper": cases_fp8_gemm.GEMM_HOPPER,
    "fp8_wgrad": cases_fp8_gemm.WGRAD,
    "fp8_wgrad_triton": cases_fp8_gemm.WGRAD_TRITON,
    "fp8_wgrad_hopper": cases_fp8_gemm.WGRAD_HOPPER,
    "fp8_experts": cases_fp8_experts.EXPERTS,
}
RESULTS = Path("benchmarks/results")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: that of `bench`, or 2 for a user's error."""
    parser = argparse.ArgumentParser(description="Check and time every op.")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--case", nargs="+", default=[], help=f"of {', '.join(CASES)}")
    parser.add_argument("--check", action="store_true", help="check the ops, measure nothing")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are done")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # `peak_in_fresh_process`
    args = parser.parse_args(arguments)
    try:
        if args.peak:
            print(peak_here(args.case[0], *args.peak))
            return 0
        return bench(
            args.device,
            args.case,
            args.out,
            check=args.check,
            resume=args.resume,
            seconds=args.seconds,
        )
    except UserError as error:
        print(f"r1kern: error: {error}", file=sys.stderr)
        return 2


def bench(
    device: str | None,
    names: list[str],
    folder: Path,
    *,
    check: bool = False,
    resume: bool = False,
    seconds: float = float("inf"),
) -> int:
    """Check or measure ops, one row after another, and write the rows to `folder`.

    Args:
        device: "cpu", "cuda", or None: CUDA if there is a device.
        names: cases to go through; none: all.
        folder: where `kernels_<device>.json` and `.md` are, or `checks_<device>.json`.
        check: check the ops at all their edge cases and measure nothing.
        resume: keep the rows that passed, where they were measured with today's sources.
        seconds: start no row later than this after the start.

    Returns:
        0; 1 where a check failed; 3 where time ran out before the last row.

    Raises:
        UserError: an unknown case or device, or no CUDA device.
    """
    started = time.monotonic()
    place = _device(device)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise UserError(f"no case {unknown[0]!r}: choose of {', '.join(CASES)}")
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, for every rival too
    book = Book(folder, "checks" if check else "kernels", place, resume)
    rows = [row for row in plan(names or list(CASES), place.type, check) if not book.has(*row)]
    step = check_row if check else Meter(place) if rows else None
    done = []
    for name, shape in rows:
        if time.monotonic() - started > seconds:
            break
        try:
            row = step(name, shape, place)
        except Exception as error:  # an op that cannot run is a failed row; the others go on
            row = {"failed": _told(error)}
        done.append(book.add(name, shape, row))
        print(table.line(done[-1]), flush=True)
        _release(place)
    failed, left = sum("failed" in row for row in done), len(rows) - len(done)
    print(f"{len(done)} rows done, {failed} FAILED, {left} left: {book.path}")
    return 1 if failed else 3 if left else 0


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"no device {name!r}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is seen here: use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def plan(names: list[str], kind: str, checking: bool) -> Iterator[tuple[str, Shape]]:
    """What is to be done, in order: cases and shapes."""
    for name in names:
        case = CASES[name]
        shapes = case.shapes[kind]
        if checking:
            small = [case.shrink(shape) for shape in shapes]
            shapes = list({label(s): s for s in [*small, *case.edges[kind]]}.values())
        for shape in shapes:
            yield name, shape


class Book:
    """The rows of one device, in a file that is written after every row."""

    def __init__(self, folder: Path, title: str, device: torch.device, resume: bool) -> None:
        self.title = title
        self.slug = harness.slug(device)
        self.path = folder / f"{title}_{self.slug}.json"
        self.header = harness.describe(device) | {"source": source_hash()}
        self.kept: dict[tuple, dict] = {}
        self.resume = resume
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.kept = {_key(row): row for row in json.loads(self.path.read_text())}

    def has(self, case: str, shape: Shape) -> bool:
        """Whether the row is to be kept: resuming, it passed, with the sources of today."""
        row = self.kept.get((self.slug, case, label(shape)))
        return bool(
            self.resume and row and "failed" not in row and row["source"] == self.header["source"]
        )

    def add(self, case: str, shape: Shape, row: dict) -> dict:
        """Writes the row, in the place of an earlier one of its name; returns it in full."""
        row = {"slug": self.slug, "case": case, "shape": label(shape), **row, **self.header}
        self.kept.pop(_key(row), None)
        self.kept[_key(row)] = row
        rows = list(self.kept.values())
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(rows, indent=1) + "\n")
        partial.replace(self.path)
        if self.title == "kernels":
            self.path.with_suffix(".md").write_text(table.markdown(rows))
        return row


def _key(row: dict) -> tuple[str, str, str]:
    return row["slug"], row["case"], row["shape"]


def check_row(name: str, shape: Shape, device: torch.device) -> dict:
    fault = check_case(CASES[name], shape, device)
    return {"failed": fault} if fault else {"passed": True}


class Meter:
    """Measures rows; knows the limits of the device, each measured when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.limits = functools.cache(partial(harness.measure_limits, device))

    def __call__(self, name: str, shape: Shape, device: torch.device) -> dict:
        """One row: times, rate, per cent of the limits, peak memory, and each baseline's."""
        case = CASES[name]
        fault = check_case(case, case.shrink(shape), device)
        if fault:
            return {"failed": fault}
        _release(device)
        row = figures(name, "ours", case.ours, shape, device)
        row |= self.against_limits(row["us"][1], case.work(shape), case.precision)
        row["published"] = case.published.get(label(shape), "")
        row["baselines"] = {rival: beside(name, rival, shape, device) for rival in case.baselines}
        return row

    def against_limits(self, us: float, work: harness.Work, precision: str) -> dict:
        measured, datasheet = self.limits(precision), None
        if self.device.type == "cuda":
            datasheet = harness.datasheet_limits(torch.cuda.get_device_name(), precision)
        by = harness.bound(work, datasheet or measured)
        rate = work.flops / 1e12 if by == "flops" else work.bytes / 1e9
        row = {
            "gflop": work.flops / 1e9,
            "mbyte": work.bytes / 1e6,
            "bound": by,
            "precision": precision,
            "rate": rate / (us * 1e-6),
            "unit": "TFLOP/s" if by == "flops" else "GB/s",
        }
        for kind, limits in (("measured", measured), ("datasheet", datasheet)):
            if limits:
                row[f"percent_of_{kind}"] = harness.percent_of_limit(us, work, limits)
                row[f"{kind}_limits"] = limits._asdict()
        return row


def figures(
    name: str, which: str, forward: Forward | Prepared, shape: Shape, device: torch.device
) -> dict:
    """Time and peak memory of one forward of a case: `which` is "ours" or a baseline's name."""
    case = CASES[name]
    sets = ready_runs(case, forward, shape, device)
    timing = harness.measure(_call, sets, device)
    ((once,), *_) = sets
    if device.type == "cuda":
        peak = harness.peak_memory(once, device)
    else:
        peak = peak_in_fresh_process(name, which, shape)
    return {
        "us": [round(us, 2) for us in timing],
        "peak_mib": round(peak / 2**20, 1),
        "results_mib": round(sum(x.nbytes for x in once()) / 2**20, 1),
    }


def ready_runs(
    case: Case, forward: Forward | Prepared, shape: Shape, device: torch.device
) -> list[tuple[Callable[[], Tensors]]]:
    """One run on each of several sets of inputs to take in turn; only one set where it is far
    larger than any cache."""
    count = 4 if case.work(shape).bytes < 256 << 20 else 1
    inputs = (case.inputs(shape, device, seed) for seed in range(count))
    return [(ready(case, forward, shape, one),) for one in inputs]


def _call(run: Callable[[], Tensors]) -> Tensors:
    return run()


def times_ours(
    case: Case, forward: Forward | Prepared, shape: Shape, device: torch.device
) -> float:
    """A baseline's time over ours, both measured in turn."""
    both = [ready_runs(case, f, shape, device) for f in (case.ours, forward)]
    sets = [(ours, rival) for (ours,), (rival,) in zip(*both, strict=True)]
    turns = [lambda ours, rival: ours(), lambda ours, rival: rival()]
    ours, rival = harness.measure_in_turn(turns, sets, device)
    return rival.p50 / ours.p50


def beside(name: str, rival: str, shape: Shape, device: torch.device) -> dict:
    """A baseline's figures and its time in units of ours, or why there are none."""
    case = CASES[name]
    try:
        forward = forward_of(case, rival, device.type)
        other = differs(case, forward, case.shrink(shape), device)
        if other:
            return {"absent": other}
        _release(device)
        row = figures(name, rival, forward, shape, device)
        _release(device)
        ratio = times_ours(case, forward, shape, device)
    except ImportError as error:
        return {"absent": str(error)}
    except Exception as error:  # somebody else's code: what it raised is part of the row
        return {"absent": _told(error)}
    finally:
        _release(device)
    return row | {"times_ours": round(ratio, 3)}


def forward_of(case: Case, which: str, kind: str) -> Forward | Prepared:
    return case.ours if which == "ours" else case.baselines[which](kind)


# glibc gives blocks above these sizes back as they are freed: what it kept of the warm-up would be
# missing from the peak.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_in_fresh_process(name: str, which: str, shape: Shape) -> int:
    """Peak memory in bytes of one run on the CPU, in a process of its own."""
    command = [sys.executable, "-m", "r1kern.benchmarks.kernels"]
    command += ["--case", name, "--peak", which, json.dumps(shape)]
    environment = os.environ | GIVE_BACK
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak memory of {name} ({which}): {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def peak_here(name: str, which: str, shape: str) -> int:
    """What `peak_in_fresh_process` starts: a small run, then the one whose peak is taken."""
    case, full, device = CASES[name], json.loads(shape), torch.device("cpu")
    forward = forward_of(case, which, "cpu")
    small = case.shrink(full)
    ready(case, forward, small, case.inputs(small, device, 0))()
    once = ready(case, forward, full, case.inputs(full, device, 0))
    return harness.peak_memory(once, device)


def source_hash() -> str:
    """Names the sources that rows were measured with: the ops, their kernels, the extension."""
    folders = (Path(module.__file__).parent for module in (ops, reference))
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    extension = importlib.util.find_spec("r1kern._C")
    paths += [Path(extension.origin)] if extension else []
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
