"""Readings of the machine: real host memory, NVML's absence here, its bits by its constants."""

import logging
import math

import psutil
import pynvml
import pytest
import torch

from r1kern import distributed
from r1kern.report import device

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without one")


def test_throttle_bits_become_words():
    assert device.decode(pynvml.nvmlClocksEventReasonNone) == []
    assert device.decode(pynvml.nvmlClocksEventReasonGpuIdle) == []
    assert device.decode(pynvml.nvmlClocksEventReasonSwPowerCap) == ["power_cap"]
    both = (
        pynvml.nvmlClocksEventReasonHwThermalSlowdown
        | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
        | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
    )
    assert device.decode(both) == ["hw_thermal", "hw_power_brake"]
    assert set(device.FAULTS) <= set(device.decode(pynvml.nvmlClocksEventReasonAll))
    # Older names of the same bits.
    assert device.decode(pynvml.nvmlClocksThrottleReasonHwSlowdown) == ["hw_slowdown"]


def test_ranks_become_one_value_and_what_is_missing_is_left_out():
    metrics = device.summarise(
        {
            "host/rss_gib": [1.0, 3.0],
            "host/available_gib": [math.nan, 5.0],
            "device/energy_j": [10.0, 30.0],
            "device/power_w": [10.0, 30.0],
            "device/sm_clock_mhz": [math.nan, math.nan],
            device.BITS: [float(pynvml.nvmlClocksEventReasonHwThermalSlowdown), math.nan],
        }
    )
    throttled = {k: v for k, v in metrics.items() if k.startswith("device/throttled/")}
    assert {k: v for k, v in throttled.items() if v} == {"device/throttled/hw_thermal": 1.0}
    assert len(throttled) == len(device.THROTTLES)
    assert {k: v for k, v in metrics.items() if k not in throttled} == {
        "host/rss_gib": 3.0,
        "host/available_gib": 5.0,
        "device/energy_j": 40.0,
        "device/power_w": 20.0,
    }


@no_gpu
def test_on_cpu_the_host_is_read():
    metrics = device.Meter(distributed.start()).step()
    distributed.shutdown()
    assert set(metrics) == set(device.HOST)
    assert metrics["host/rss_gib"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, 0.1)
    assert metrics["host/available_gib"] < psutil.virtual_memory().total / 2**30


@no_gpu
def test_an_nvml_that_refuses_is_said_once_and_goes_on(caplog):
    gpu = device.Gpu.__new__(device.Gpu)
    gpu._said, gpu._device = set(), torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert gpu._read("NVML", pynvml.nvmlInit) is None
    (record,) = caplog.records
    assert "NVML of cuda:0 is not in the metrics" in record.getMessage()


def test_a_hardware_slowdown_is_warned_of_once(caplog):
    meter = device.Meter.__new__(device.Meter)
    meter._warned = set()
    bits = float(pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown)
    with caplog.at_level(logging.WARNING):
        meter._warn([math.nan, 0.0, bits])
        meter._warn([bits, bits, bits])
    (record,) = caplog.records
    assert record.getMessage().startswith("r1kern: GPU of rank 2: the power supply")
