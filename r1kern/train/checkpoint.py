"""Checkpoints: model and optimizer by Megatron's dist_checkpointing, the run's state beside them.

A checkpoint is a folder `step_000042` that gets its name only when it is whole, so that a killed or
full-disk save leaves the one before untouched.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from r1kern.errors import UserError
from r1kern.train.policy import Policy

STATE = "state.json"

# What a file that cannot be written or read comes as, from torch and Megatron.
FAILURES = (
    OSError,
    RuntimeError,
    KeyError,
    EOFError,
    CheckpointException,  # torch's; a BaseException
    CheckpointingException,  # Megatron's
    pickle.UnpicklingError,
)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run; they live in its `checkpoints/`.
        keep_last: older ones are removed after a save.
    """

    def __init__(self, folder: Path, *, keep_last: int):
        self.folder = folder / "checkpoints"
        self._keep_last = keep_last

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(self.folder.glob("step_[0-9]*"))
        found = [path for path in found if path.is_dir() and not path.name.endswith(".tmp")]
        return found[-1] if found else None

    def save(self, policy: Policy, step: int, state: dict) -> None:
        """Write everything that continuing after `step` steps needs; collective.

        Args:
            state: JSON values of the loop (data cursor, ...).

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints stand.
        """
        final = self.folder / f"step_{step:06d}"
        scratch = final.with_suffix(".tmp")
        try:
            self._write(policy, scratch, {"step": step, **state})
        except FAILURES as error:
            kept = self.latest()
            raise UserError(
                f"checkpoint {final} could not be written ({_one_line(error)}): free some space "
                f"and --resume; the last good checkpoint is {kept or 'none'}"
            ) from error
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            for old in sorted(self.folder.glob("step_[0-9]*"))[: -self._keep_last]:
                shutil.rmtree(old)
        dist.barrier()

    def _write(self, policy: Policy, scratch: Path, state: dict) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        dist.barrier()
        _keep_results_in_process()
        dist_checkpointing.save(_sharded_state(policy, loading=False), str(scratch))
        torch.save(_random_state(), scratch / f"random_{dist.get_rank()}.pt")
        dist.barrier()
        if dist.get_rank() == 0:
            extra = {
                "version": policy.version,
                "world_size": dist.get_world_size(),
                "scheduler": policy.scheduler.state_dict(),
            }
            (scratch / STATE).write_text(json.dumps({**state, **extra}))
            _sync_to_disk(scratch)

    def load(self, policy: Policy, path: Path) -> dict:
        """Put the policy and this rank's random state where they were; returns the loop's state.

        Raises:
            UserError: not a checkpoint of ours, cut short, of another model, or unsafe.
        """
        if not (path / STATE).is_file():
            raise UserError(
                f"{path} is not an r1kern checkpoint (no {STATE}): give a folder named "
                f"step_NNNNNN from a run's checkpoints/"
            )
        state = json.loads((path / STATE).read_text())
        refuse_unsafe_pickle(path / ".metadata")
        wanted = _sharded_state(policy, loading=True)
        try:
            loaded = dist_checkpointing.load(wanted, str(path))
        except FAILURES as error:
            raise UserError(
                f"checkpoint {path} cannot be loaded ({_one_line(error)}): it is damaged or of "
                f"another model; remove it to resume from the one before"
            ) from error
        policy.model.load_state_dict(loaded["model"], strict=False)
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.scheduler.load_state_dict(state["scheduler"])
        policy.version = state["version"]
        mine = path / f"random_{dist.get_rank()}.pt"
        if state["world_size"] == dist.get_world_size():
            _restore_random_state(torch.load(mine, weights_only=True))
        return state


def _keep_results_in_process() -> None:
    """Give Megatron's writer a plain queue for its results.

    By default it starts a manager process for asynchronous saves, which costs seconds, imports the
    user's `__main__` again and outlives a killed trainer.

    Raises:
        RuntimeError: Megatron's name for the queue has changed.
    """
    if not hasattr(filesystem_async, "_results_queue"):
        raise RuntimeError(
            "megatron.core.dist_checkpointing...filesystem_async._results_queue is gone: "
            "r1kern/train/checkpoint.py must be brought up to date with the installed megatron-core"
        )
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _sharded_state(policy: Policy, *, loading: bool) -> dict:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    model = policy.model.sharded_state_dict(metadata=metadata)
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _random_state() -> dict:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what checkpoint metadata is made of and calls nothing else."""

    modules = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.planner",
    )

    def find_class(self, module, name):
        is_plain = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, type))
        if (
            is_plain
            or module in self.modules
            or (module, name)
            == (
                "torch.serialization",
                "_get_layout",
            )
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run '{module}.{name}' when loaded")


def refuse_unsafe_pickle(path: Path) -> None:
    """Try a pickle under an unpickler that only knows torch's checkpoint metadata.

    torch.distributed.checkpoint reads its metadata with `pickle`, which runs what the file names.

    Raises:
        UserError: the pickle names anything else, or is cut short.
    """
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except (*FAILURES, AttributeError, ImportError) as error:
        raise UserError(
            f"{path} cannot be trusted or read ({_one_line(error)}): remove this checkpoint to "
            f"resume from the one before"
        ) from error


def _sync_to_disk(folder: Path) -> None:
    """Make the files durable before their folder gets its final name."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
