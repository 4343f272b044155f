"""Is this machine fit to run r1kern?  One `Check` per thing that can be amiss."""

from __future__ import annotations

from r1kern.doctor import gpus, machine, software
from r1kern.doctor.check import Check

__all__ = ["Check", "report"]


def report() -> list[Check]:
    """Every check, the most basic first.  Takes seconds and changes nothing."""
    build, devices = software.torch_build()
    on_gpu = devices.ok is True
    return [
        *software.packages(),
        build,
        devices,
        software.triton(),
        software.generator(),
        software.transformer_engine(),
        software.flash_attention(),
        software.torchvision(),
        software.extension(),
        software.compiler(needed=on_gpu),
        software.offline(),
        *(gpus.checks() if on_gpu else ()),
        machine.memory(),
        machine.shared_memory(needed=on_gpu),
        machine.disk(),
        machine.cores(),
        machine.open_files(),
        machine.processes(),
        machine.locked_memory(),
        machine.fabric(),
        machine.sandbox(),
    ]
