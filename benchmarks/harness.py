"""How every benchmark is measured: time, peak memory, the machine, and the machine's limits.

One harness for CPU and GPU.  Time is p20/p50/p80 over many runs after a warm-up; on CUDA by events,
with the L2 cache overwritten before every run.  Peak memory is what a call holds above what was
there before it, its results included.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from r1kern.errors import UserError

# Dense bf16 FLOP/s and bytes/s by datasheet (SXM), and FLOP/s in FP8.
DATASHEET = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
DATASHEET_FP8 = 1979e12

VERSIONS = ("torch", "triton", "liger-kernel", "megatron-core", "transformer-engine", "deep-gemm")

# Overwriting this much takes a GPU some 0.3 ms: far more than any L2 cache holds, and long enough
# for the host to launch the next run meanwhile, so that launch overhead is not timed.
FLUSH_BYTES = 1 << 30


class Timing(NamedTuple):
    """Microseconds a run: the 20th, 50th and 80th percentile of all runs."""

    p20: float
    p50: float
    p80: float


class Limits(NamedTuple):
    """What a device can do: FLOP/s of matrix products, bytes/s read plus written."""

    flops: float
    bytes: float


class Work(NamedTuple):
    """What an op must do at least: floating-point operations, bytes read plus written."""

    flops: float
    bytes: float


def percentiles(times: Sequence[float]) -> Timing:
    """p20, p50, p80 of at least two times, interpolated linearly."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(deciles[1], deciles[4], deciles[7])


def measure(
    run: Callable[..., object],
    inputs: Sequence[tuple],
    device: torch.device,
    *,
    budget_s: float = 3.0,
    runs: tuple[int, int] = (5, 100),
) -> Timing:
    """Time of `run(*inputs[i])`, i rotating over the given sets of inputs.

    Args:
        run: what is timed; its result is dropped.
        inputs: at least one tuple of arguments; several keep one set's data out of the caches.
        device: where `run` computes: CUDA is timed by events, a CPU by the clock.
        budget_s: seconds of timed runs aimed at.
        runs: fewest and most timed runs.
    """
    sets = itertools.cycle(inputs)
    timed = _timed_cuda if device.type == "cuda" else _timed_cpu
    timed(run, sets, 1)  # lazy set-up: compilation, autotuning, handles
    (once,) = timed(run, sets, 1)
    count = min(max(int(budget_s * 1e6 / max(once, 1e-3)), runs[0]), runs[1])
    if once < 1e5:
        timed(run, sets, min(count, 10))
    return percentiles(timed(run, sets, count))


def measure_in_turn(
    functions: Sequence[Callable[..., object]],
    inputs: Sequence[tuple],
    device: torch.device,
    *,
    budget_s: float = 3.0,
    runs: tuple[int, int] = (5, 50),
) -> list[Timing]:
    """As `measure`, for several functions, one run of each in turn.

    For ratios: a machine that drifts while they are measured drifts for all alike.
    """
    sets = itertools.cycle(inputs)
    timed = _timed_cuda if device.type == "cuda" else _timed_cpu
    once = sum(timed(f, sets, 1)[0] for f in functions)
    count = min(max(int(budget_s * 1e6 / once), runs[0]), runs[1])
    rounds = [[timed(f, sets, 1)[0] for f in functions] for _ in range(count)]
    return [percentiles(times) for times in zip(*rounds, strict=True)]


def _timed_cpu(run: Callable[..., object], sets, count: int) -> list[float]:
    times = []
    for _ in range(count):
        arguments = next(sets)
        start = time.perf_counter()
        run(*arguments)
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _timed_cuda(run: Callable[..., object], sets, count: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(count):
        arguments = next(sets)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run(*arguments)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `run()` holds at any time above what was held before, its result included.

    On CUDA, the caching allocator's count.  On a CPU, the resident set of this process: call it
    once in a fresh process, since freed memory may stay with the allocator; Linux only.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        raise UserError("peak memory on a CPU is read from /proc: run this on Linux")
    gc.collect()
    clear.write_text("5")  # the peak starts again from the present size
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def measure_limits(device: torch.device, precision: str = "") -> Limits:
    """The limits of this device, seen now: a large square product and a large copy, by their
    fastest fifth.

    The product is in bf16 on CUDA, with `precision` "fp8" in FP8 with one scale a tensor; in fp32
    on a CPU, where FP8 is emulated.
    """
    cuda = device.type == "cuda"
    n, dtype, size = (8192, torch.bfloat16, 4 << 30) if cuda else (2048, torch.float32, 256 << 20)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    multiply, operands = torch.mm, (a, b)
    if cuda and precision == "fp8":
        scale = torch.ones((), device=device)
        multiply = partial(torch._scaled_mm, scale_a=scale, scale_b=scale, out_dtype=dtype)
        operands = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    product = measure(multiply, [operands], device, budget_s=1.0)
    source = torch.ones(size // 4, device=device)
    copy = measure(torch.empty_like(source).copy_, [(source,)], device, budget_s=1.0)
    return Limits(2 * n**3 / (product.p20 * 1e-6), 2 * size / (copy.p20 * 1e-6))


def datasheet_limits(name: str, precision: str = "") -> Limits | None:
    """Limits by datasheet of the GPU of this name, where we know them."""
    known = next((Limits(*peak) for chip, peak in DATASHEET.items() if chip in name), None)
    return known._replace(flops=DATASHEET_FP8) if known and precision == "fp8" else known


def percent_of_limit(us: float, work: Work, limits: Limits) -> float:
    """Per cent of the limit that a run of `us` reaches: of FLOP/s or of bytes/s, whichever alone
    would take longer."""
    return 100 * max(work.flops / limits.flops, work.bytes / limits.bytes) / (us * 1e-6)


def bound(work: Work, limits: Limits) -> str:
    """Which of the two takes longer: "flops" or "bytes"."""
    return "flops" if work.flops / limits.flops > work.bytes / limits.bytes else "bytes"


def describe(device: torch.device) -> dict[str, object]:
    """What a row must name to be read later: device, driver, versions, date."""
    cuda = device.type == "cuda"
    versions = {n: _version(n) for n in VERSIONS}
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "date": date.today().isoformat(),
    }


def slug(device: torch.device) -> str:
    """Short name of the device for file names: "cpu", "h200"."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name()
    chip = re.search(r"\b[A-Z]{1,3}\d+\w*", name)
    return (chip[0] if chip else re.sub(r"\W+", "_", name)).lower()


def present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return answer.stdout.splitlines()[0]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
