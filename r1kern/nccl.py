"""NCCL: what is set before CUDA starts, and the record of collectives that a hang leaves behind."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist

DUMP = "TORCH_FR_DUMP_TEMP_FILE"  # torch's own name: prefix of the files, the rank follows


def set_environment(*, tp: int, record_folder: str | Path | None = None) -> None:
    """Set what is not set yet; must run before CUDA starts in this process.

    `CUDA_DEVICE_MAX_CONNECTIONS=1` makes the GPU start kernels in the order of their calls, so that
    Megatron's tensor-parallel communication overlaps with the products behind it (needed up to
    Hopper).  The other two have NCCL's watchdog write the last collectives of every rank into
    `record_folder`; torch records them (gloo's too) whether they are written or not.

    Args:
        tp: tensor-parallel size.
        record_folder: of the flight recorder's files `rank_N`; None: they are not written.
    """
    if tp > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if record_folder is not None:
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault(DUMP, f"{record_folder}/rank_")


def dump_collectives() -> str | None:
    """Write this rank's recorded collectives where `set_environment` said.

    The file is a pickle; of NCCL's, `torchfrtrace` (it comes with torch) reads all ranks' together
    and says which rank did not join which collective.

    Returns:
        The last collective and the file, in a line; None where no folder was given.
    """
    prefix = os.environ.get(DUMP)
    if prefix is None or not dist.is_initialized():
        return None
    c10d = torch._C._distributed_c10d
    record = (c10d._dump_nccl_trace if dist.get_backend() == "nccl" else c10d._dump_fr_trace)()
    path = Path(f"{prefix}{dist.get_rank()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record)
    last = pickle.loads(record)["entries"][-1:]
    shown = [
        f"#{entry['record_id']} {entry['profiling_name']} of {entry['input_sizes']}"
        for entry in last
    ]
    return f"last collective: {shown[0] if shown else 'none'}; all: {path}"
