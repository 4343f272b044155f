"""Megatron's checkpoint writer in two halves: a plan made by all ranks, and the writing of files.

Megatron writes from processes that it forks, which is unsafe beside the threads of CUDA, gloo and
vLLM, and takes a manager process for their results.  Here its plan is kept and its own function
writes the files from whichever thread of this process asks for it.
"""

from __future__ import annotations

import inspect
import io
import queue
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

FORMAT = ("torch_dist", 1)


class _Planner(TorchDistSaveShardedStrategy):
    """Ends with the plan where Megatron would go on to a request that forks."""

    def _get_save_and_finalize_callbacks(self, writer, planned):
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


@dataclass(frozen=True)
class Snapshot:
    """What this rank has to write, in host memory and apart from the model.

    Attributes:
        writer: Megatron's, which knows the folder.
        buckets: one per file: its path, its name, and its data.
        metadata: where every tensor will lie; on rank 0 only.
        common: the file of everything that is not sharded.
    """

    writer: filesystem_async.FileSystemWriterAsync
    buckets: list[tuple]
    metadata: Metadata | None
    common: bytes


def take_snapshot(sharded_state: dict, folder: Path, live: list[torch.Tensor]) -> Snapshot:
    """Plan the files of `sharded_state` and copy this rank's share; collective.

    Args:
        sharded_state: Megatron's, of model and optimizer.
        folder: to be written to.
        live: tensors that go on changing: what shares their memory is copied.
    """
    _check_megatron()
    sharded, common = save_preprocess(sharded_state)
    planner = _Planner(*FORMAT)
    planner.async_save(sharded, folder)
    file = io.BytesIO()
    torch.save(common, file)
    moving = {t.untyped_storage().data_ptr() for t in live}

    def to_host(tensor):
        return tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in moving)

    buckets = [
        (path, name, (blobs, [(item, to_host(tensor)) for item, tensor in tensors]))
        for path, name, (blobs, tensors) in planner.writer.write_buckets
    ]
    planner.writer.write_buckets = None  # it would keep the model's tensors
    return Snapshot(planner.writer, buckets, planner.metadata, file.getvalue())


def write_files(snapshot: Snapshot) -> list[WriteResult]:
    """Write this rank's share; no other rank takes part.

    Raises:
        OSError, RuntimeError: the disk is full, not writable, gone.
    """
    # Unwrapped: the decorator would switch off the whole process's garbage collection.
    write = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
    transforms = [snapshot.writer.transforms] if hasattr(snapshot.writer, "transforms") else []
    written = []
    for bucket in snapshot.buckets:
        results, running = queue.Queue(), queue.Queue()
        running.put(0)
        write(transforms, 0, bucket, results, running, use_fsync=True)
        _, result = results.get()
        if isinstance(result, Exception):
            raise result
        written += result
    return written


def write_index(snapshot: Snapshot, folder: Path, results: list[list[WriteResult]]) -> None:
    """Write what makes the files of all ranks a checkpoint; on rank 0.

    Args:
        results: what `write_files` returned on each rank.
    """
    (folder / COMMON_STATE_FNAME).write_bytes(snapshot.common)
    snapshot.writer.finish(snapshot.metadata, results)
    save_config(CheckpointingConfig(*FORMAT), str(folder))


def _check_megatron() -> None:
    """Give Megatron's writer a plain queue where it would start a manager process.

    That process costs seconds, imports the user's `__main__` again and outlives a killed trainer.

    Raises:
        RuntimeError: Megatron's names have changed.
    """
    for owner, name in (
        (filesystem_async, "_results_queue"),
        (filesystem_async.FileSystemWriterAsync, "write_preloaded_data"),
        (TorchDistSaveShardedStrategy, "_get_save_and_finalize_callbacks"),
    ):
        if not hasattr(owner, name):
            raise RuntimeError(
                f"{owner.__name__}.{name} is gone: r1kern/train/checkpoint_writer.py must be "
                f"brought up to date with the installed megatron-core"
            )
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
