"""What a run ran on: a small file in its folder, for its report."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # the page's reader knows the file's name without loading torch
    from r1kern.distributed import World

MACHINE = "machine.json"
GIB = 2**30


def record_machine(folder: Path, world: World) -> None:
    """Write this process's machine, the size of the job and the main versions."""
    found = {
        "processes": f"{world.size} process{'' if world.size == 1 else 'es'}",
        "device": _device(world),
        "host": f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / GIB:.0f} GiB",
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {version('torch')}",
    }
    (folder / MACHINE).write_text(json.dumps(found, indent=1) + "\n")


def _device(world: World) -> str:
    if world.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(world.device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
