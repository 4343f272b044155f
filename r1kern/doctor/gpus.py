"""The GPUs: driver, health, links between them, NCCL.  By NVML, which needs no CUDA context."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations

import pynvml

from r1kern.doctor.check import Check

ALLREDUCE_TIMEOUT_S = 180
LEAST_CAPABILITY = (8, 0)  # bfloat16
BUSY_GIB = 2  # what a GPU that nobody uses holds at most


def checks() -> list[Check]:
    """All of them, on a machine where torch sees a GPU."""
    found = [allocator()]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [*found, Check("NVML", None, str(error), "metrics will lack power and clocks")]
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return [
        *found,
        driver(),
        *(_ask(name, check, gpus) for name, check in ASPECTS.items()),
        nccl(),
        *([allreduce()] if len(gpus) > 1 else []),
    ]


def _ask(name: str, check: Callable, gpus: list) -> Check:
    """A check whose question some GPUs do not answer."""
    try:
        return check(gpus)
    except pynvml.NVMLError as error:
        return Check(name, None, f"not known: {error}")


def allocator() -> Check:
    """Expandable segments keep the memory that a sleeping generator gives back."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        setting = os.environ.get(name, "")
        if re.search(r"expandable_segments:\s*true", setting, re.IGNORECASE):
            remedy = f"unset {name}, or set generator.sleep=false"
            return Check("CUDA allocator", False, f"{name}={setting}", remedy)
    return Check("CUDA allocator", True, "no expandable segments")


def driver() -> Check:
    """The CUDA version that the driver supports, against the one torch was built for."""
    import torch

    version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    most = (version // 1000, version % 1000 // 10)
    return _driver(pynvml.nvmlSystemGetDriverVersion(), most, torch.version.cuda)


def _driver(driver: str, most: tuple[int, int], built: str) -> Check:
    wanted = tuple(map(int, built.split(".")[:2]))
    found = f"{driver}, up to CUDA {most[0]}.{most[1]}; torch is built for {built}"
    if wanted[0] > most[0]:
        remedy = f"install a driver for CUDA {wanted[0]}, or a torch built for CUDA {most[0]}"
        return Check("driver", False, found, remedy)
    if wanted > most:
        remedy = "works within a major version, without what is new (PTX): update the driver"
        return Check("driver", None, found, remedy)
    return Check("driver", True, found)


def capability(gpus: list) -> Check:
    versions = [pynvml.nvmlDeviceGetCudaComputeCapability(gpu) for gpu in gpus]
    found = ", ".join(f"{major}.{minor}" for major, minor in sorted(set(versions)))
    ok = min(versions) >= LEAST_CAPABILITY
    if not ok:
        return Check("compute capability", False, found, "8.0 (A100) or newer is needed: bfloat16")
    if min(versions) < (9, 0):
        return Check("compute capability", None, f"{found}: no FP8; kernels are tuned for 9.0")
    return Check("compute capability", True, found)


def memory_in_use(gpus: list) -> Check:
    used = [pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30 for gpu in gpus]
    busy = [f"GPU {i}: {gib:.1f} GiB" for i, gib in enumerate(used) if gib > BUSY_GIB]
    if busy:
        return Check("GPU memory in use", None, ", ".join(busy), "another process? see nvidia-smi")
    return Check("GPU memory in use", True, f"{max(used):.1f} GiB at most")


def mig(gpus: list) -> Check:
    on = [i for i, gpu in enumerate(gpus) if pynvml.nvmlDeviceGetMigMode(gpu)[0]]
    if on:
        remedy = "NCCL does not join the parts of a GPU: nvidia-smi -mig 0, or use one process"
        return Check("MIG", False if len(gpus) > 1 else None, f"on, GPUs {on}", remedy)
    return Check("MIG", True, "off")


def persistence(gpus: list) -> Check:
    off = [i for i, gpu in enumerate(gpus) if not pynvml.nvmlDeviceGetPersistenceMode(gpu)]
    if off:
        return Check("persistence mode", None, f"off, GPUs {off}: slow starts", "nvidia-smi -pm 1")
    return Check("persistence mode", True, "on")


def ecc(gpus: list) -> Check:
    """Memory errors since the last reset that could not be corrected, and rows to be replaced."""
    bad = []
    for i, gpu in enumerate(gpus):
        errors = pynvml.nvmlDeviceGetTotalEccErrors(
            gpu, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        )
        _, _, pending, failed = pynvml.nvmlDeviceGetRemappedRows(gpu)
        bad += [f"GPU {i}: {errors} uncorrected errors"] if errors else []
        bad += [f"GPU {i}: rows wait for a reset"] if pending else []
        bad += [f"GPU {i}: remapping failed"] if failed else []
    if bad:
        remedy = "reset the GPU (nvidia-smi -r) or take the node out; failed remapping: replace it"
        return Check("ECC", False, ", ".join(bad), remedy)
    return Check("ECC", True, "no uncorrected error")


def links(gpus: list) -> Check:
    """NVLink between every pair, and as many links up on each GPU as on the others."""
    if len(gpus) == 1:
        return Check("NVLink", None, "one GPU")
    up = [_links_up(gpu) for gpu in gpus]
    pairs = list(combinations(gpus, 2))
    index, fine = pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_STATUS_OK
    joined = sum(pynvml.nvmlDeviceGetP2PStatus(a, b, index) == fine for a, b in pairs)
    found = f"{joined} of {len(pairs)} pairs, {min(up)} links a GPU"
    if len(set(up)) > 1:
        remedy = "a link is down: nvidia-smi nvlink -s, nvidia-smi topo -m; reset or drain the node"
        return Check("NVLink", False, f"{found} at least, {max(up)} at most", remedy)
    if not joined:
        return Check("NVLink", None, f"{found}: PCIe only", "keep parallel.tp small")
    if joined < len(pairs):
        return Check("NVLink", None, found, "keep each tensor-parallel group within joined GPUs")
    return Check("NVLink", True, found)


def _links_up(gpu) -> int:
    up = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            up += pynvml.nvmlDeviceGetNvLinkState(gpu, link)
        except pynvml.NVMLError:  # this GPU has no such link
            break
    return up


ASPECTS = {
    "compute capability": capability,
    "GPU memory in use": memory_in_use,
    "MIG": mig,
    "persistence mode": persistence,
    "ECC": ecc,
    "NVLink": links,
}


def nccl() -> Check:
    import torch

    if not torch.distributed.is_nccl_available():
        return Check("NCCL", False, "not in this torch", "install a CUDA build of torch for Linux")
    return Check("NCCL", True, ".".join(map(str, torch.cuda.nccl.version())))


def allreduce(mib: int = 256) -> Check:
    """Two processes sum a tensor: NCCL on two GPUs (gloo where there is none)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "r1kern.doctor.allreduce", str(mib)]
    remedy = "run it with NCCL_DEBUG=INFO; in containers --ipc=host and a large --shm-size"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ALLREDUCE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Check("all-reduce", False, f"hangs ({ALLREDUCE_TIMEOUT_S} s)", remedy)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return Check("all-reduce", False, lines[0].strip() if lines else "fails", remedy)
    return Check("all-reduce", True, done.stdout.strip().splitlines()[-1])
