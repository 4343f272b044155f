"""The host: memory, disk, limits, network, sandbox."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import psutil

from r1kern.doctor.check import Check, at_least
from r1kern.errors import UserError
from r1kern.rewards.code import run_tests
from r1kern.rewards.programs.sandbox import REMEDY

RAM_GIB = 8  # what the demo may take
DISK_GIB = 2  # the demo's run folder and the caches of vLLM and torch
SHM_GIB = 1  # what NCCL's shared-memory transport may take
OPEN_FILES = 1024
PROCESSES = 4096  # threads count: about 200 a rank, with OpenMP's and vLLM's

CGROUP = Path("/sys/fs/cgroup")
INFINIBAND = Path("/sys/class/infiniband")


def memory() -> Check:
    """RAM that can still be taken, within the control group's limit (a container's) if any."""
    free = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used)
    remedy = f"the demo may take {RAM_GIB} GiB: close programs, or raise the container's limit"
    return at_least("free RAM", free, RAM_GIB, remedy)


def _cgroup(name: str) -> int | None:
    """A limit or use of this container (cgroup v2); None where there is none."""
    path = CGROUP / name
    text = path.read_text().split()[0] if path.is_file() else "max"
    return None if text == "max" else int(text)


def shared_memory(*, needed: bool) -> Check:
    """/dev/shm: `needed` by NCCL, information only on the CPU."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("/dev/shm", False if needed else None, "none", "mount a tmpfs there")
    remedy = "start the container with --shm-size=8g (or --ipc=host)"
    check = at_least("/dev/shm", shutil.disk_usage(path).free, SHM_GIB, remedy)
    return check if needed else Check(check.name, None, check.found)


def disk() -> Check:
    """Room where runs are written: the working folder."""
    free = shutil.disk_usage(Path.cwd()).free
    return at_least("free disk", free, DISK_GIB, "make room, or run from another folder")


def cores() -> Check:
    """CPU cores this process may use, and the container's share of their time."""
    found = str(len(os.sched_getaffinity(0)))
    path = CGROUP / "cpu.max"
    quota, period = path.read_text().split() if path.is_file() else ("max", "1")
    if quota != "max":
        found += f", {int(quota) / int(period):.1f} by the container's limit"
    return Check("CPU cores", None, found)


def open_files() -> Check:
    """The soft limit on open files: every rank, socket and checkpoint shard takes some."""
    return _limit("open files", resource.RLIMIT_NOFILE, OPEN_FILES, "ulimit -n")


def processes() -> Check:
    """Processes and threads, by the user's limit and the container's."""
    check = _limit("processes", resource.RLIMIT_NPROC, PROCESSES, "ulimit -u")
    most, now = _cgroup("pids.max"), _cgroup("pids.current")
    if most is None or now is None or not check.ok:
        return check
    found, ok = f"{check.found}, {most - now} left in the container", most - now >= PROCESSES
    remedy = f"start the container with --pids-limit={4 * PROCESSES} (or -1)"
    return Check(check.name, ok, found, "" if ok else remedy)


def _limit(name: str, limit: int, least: int, command: str) -> Check:
    soft, _ = resource.getrlimit(limit)
    unlimited = soft == resource.RLIM_INFINITY
    ok = unlimited or soft >= least
    found = "unlimited" if unlimited else str(soft)
    return Check(name, ok, found, "" if ok else f"{command} {least} (or more)")


def locked_memory() -> Check:
    """Pinned memory: InfiniBand registers its buffers under this limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", True, "unlimited")
    found = f"{soft / 2**20:.0f} MiB"
    if not (INFINIBAND.is_dir() and any(INFINIBAND.iterdir())):
        return Check("locked memory", None, f"{found} (InfiniBand would want it unlimited)")
    remedy = (
        "ulimit -l unlimited; in containers --ulimit memlock=-1; in Slurm PropagateResourceLimits"
    )
    return Check("locked memory", False, found, remedy)


def fabric() -> Check:
    """InfiniBand (or RoCE) ports, for several nodes."""
    ports = sorted(INFINIBAND.glob("*/ports/*/state")) if INFINIBAND.is_dir() else []
    if not ports:
        return Check("InfiniBand", None, "none: nodes would speak over TCP")
    active = [port for port in ports if "ACTIVE" in port.read_text()]
    down = ", ".join(f"{p.parts[-4]} port {p.parts[-2]}" for p in ports if p not in active)
    found = f"{len(active)} of {len(ports)} ports active"
    if not down:
        return Check("InfiniBand", True, found)
    return Check("InfiniBand", None, f"{found} (down: {down})", "a port in use? see `ibstat`")


def sandbox() -> Check:
    """A program is tested in bubblewrap, without network; only the code reward needs it."""
    program = "import socket\ntry: socket.socket()\nexcept OSError: print('contained')"
    try:
        result = run_tests(program, [("", "contained")], timeout_s=20.0)
    except UserError as error:
        reason, _, remedy = str(error).partition(f": {REMEDY}")
        return Check("sandbox", None, reason, REMEDY + remedy)
    if result.passed != 1:
        return Check("sandbox", False, f"a program is not contained: {result.error}", "report it")
    return Check("sandbox", True, "bubblewrap works, without network")
