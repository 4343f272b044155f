"""What the machines did during a step: GPU memory, power, clocks and throttling, host memory.

GPU figures are torch's and NVML's (`nvidia-ml-py`).  A reading that fails is said once and left
out; it never stops the run.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

import psutil
import pynvml
import torch
import torch.distributed as dist

from r1kern.distributed import World

log = logging.getLogger(__name__)

GIB = 2**30
SAMPLE_S = 1.0  # clocks, temperature and throttling are looked at so often

# Why a GPU runs below its clocks, by NVML's bits.
THROTTLES = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake",
}
FAULTS = {
    "hw_thermal": "the hardware halves its clocks against heat: look at the cooling",
    "hw_power_brake": "the power supply asks for less: look at the node's and the rack's power",
}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# How the ranks' values of a metric become one.
HOST = {"host/rss_gib": max, "host/available_gib": min}
DEVICE = {
    "device/allocated_peak_gib": max,  # by torch, within the step
    "device/reserved_peak_gib": max,
    "device/used_gib": max,  # by NVML: every process, at the end of the step
    "device/power_w": mean,  # of a GPU over the step
    "device/energy_j": sum,  # of all GPUs
    "device/sm_clock_mhz": min,
    "device/temperature_c": max,
}
BITS = "throttle bits"  # gathered beside them, reported as counts


def decode(bits: int) -> list[str]:
    """NVML's clock event reasons as words; idling and chosen clocks are none."""
    return [word for bit, word in THROTTLES.items() if bits & bit]


class Meter:
    """One rank's readings, gathered over the ranks once a step.

    Args:
        world: from `distributed.start`.
    """

    def __init__(self, world: World):
        self._world = world
        self._process = psutil.Process()
        self._gpu = Gpu(world.device) if world.device.type == "cuda" else None
        self._warned: set[str] = set()

    def step(self) -> dict[str, float]:
        """Metrics since the last call, over all ranks; collective."""
        mine = {
            "host/rss_gib": self._process.memory_info().rss / GIB,
            "host/available_gib": psutil.virtual_memory().available / GIB,
        }
        names = list(HOST)
        if self._gpu is not None:
            mine |= self._gpu.step()
            names += [*DEVICE, BITS]
        row = torch.tensor(
            [mine.get(name, math.nan) for name in names],
            dtype=torch.float64,
            device=self._world.device,
        )
        rows = [torch.empty_like(row) for _ in range(self._world.size)]
        dist.all_gather(rows, row)
        table = {name: [float(r[i]) for r in rows] for i, name in enumerate(names)}
        metrics = summarise(table)
        if self._world.is_main:
            self._warn(table.get(BITS, []))
        return metrics

    def _warn(self, bits: list[float]) -> None:
        for rank, value in enumerate(bits):
            for word in decode(int(value)) if value == value else ():
                if word in FAULTS and word not in self._warned:
                    self._warned.add(word)
                    log.warning("r1kern: GPU of rank %d: %s", rank, FAULTS[word])


def summarise(table: dict[str, list[float]]) -> dict[str, float]:
    """Metrics of the step from every rank's value, NaN where a rank has none."""
    present = {k: [v for v in values if v == v] for k, values in table.items()}
    metrics = {
        name: reduce(present[name]) for name, reduce in (HOST | DEVICE).items() if present.get(name)
    }
    if present.get(BITS):
        words = [word for bits in present[BITS] for word in decode(int(bits))]
        metrics |= {f"device/throttled/{w}": float(words.count(w)) for w in THROTTLES.values()}
    return metrics


class Gpu:
    """The GPU of this process.  A thread samples what changes within a step."""

    def __init__(self, device: torch.device):
        self._device = device
        self._said: set[str] = set()
        self._handle = self._read("NVML", lambda: _handle(device))
        self._lock = threading.Lock()
        self._clear()
        self._joules, self._since = self._energy(), time.perf_counter()
        torch.cuda.reset_peak_memory_stats(device)
        if self._handle is not None:
            threading.Thread(target=self._watch, name="r1kern-nvml", daemon=True).start()

    def step(self) -> dict[str, float]:
        """Readings since the last call, without those that failed."""
        found = {
            "device/allocated_peak_gib": torch.cuda.max_memory_allocated(self._device) / GIB,
            "device/reserved_peak_gib": torch.cuda.max_memory_reserved(self._device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._handle is None:
            return found
        used = self._read("memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        if used is not None:
            found["device/used_gib"] = used / GIB
        joules, now = self._energy(), time.perf_counter()
        if joules is not None and self._joules is not None:
            found["device/energy_j"] = joules - self._joules
            found["device/power_w"] = (joules - self._joules) / (now - self._since)
        self._joules, self._since = joules, now
        self._sample()  # at least one a step
        with self._lock:
            if self._clocks:
                found["device/sm_clock_mhz"] = mean(self._clocks)
            if self._temperatures:
                found["device/temperature_c"] = max(self._temperatures)
            if self._bits is not None:
                found[BITS] = self._bits
            self._clear()
        return found

    def _clear(self) -> None:
        self._clocks: list[float] = []
        self._temperatures: list[float] = []
        self._bits: int | None = None

    def _watch(self) -> None:
        while True:
            time.sleep(SAMPLE_S)
            self._sample()

    def _sample(self) -> None:
        handle = self._handle
        clock = self._read(
            "SM clock", lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        )
        temperature = self._read(
            "temperature",
            lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        )
        bits = self._read(
            "throttle reasons", lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        )
        with self._lock:
            self._clocks += [] if clock is None else [clock]
            self._temperatures += [] if temperature is None else [temperature]
            if bits is not None:
                self._bits = (self._bits or 0) | bits

    def _energy(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._handle is None:
            return None
        millijoules = self._read(
            "energy", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        )
        return None if millijoules is None else millijoules / 1e3

    def _read(self, name: str, call: Callable):
        """What `call` returns; None, said once, where NVML refuses."""
        try:
            return call()
        except pynvml.NVMLError as error:
            if name not in self._said:
                self._said.add(name)
                log.warning("r1kern: %s of %s is not in the metrics: %s", name, self._device, error)
            return None


def _handle(device: torch.device):
    """NVML's handle of a torch device, whatever CUDA_VISIBLE_DEVICES says.

    Raises:
        pynvml.NVMLError: no library, no driver, or a GPU that is not to be seen.
    """
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
