"""Checkpoints: model and optimizer by Megatron's dist_checkpointing, the run's state beside them.

A checkpoint is a folder `step_000042` that gets its name only when it is whole, so that a killed or
full-disk save leaves the one before untouched.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint.api import CheckpointException

from r1kern.errors import UserError
from r1kern.model import fp8
from r1kern.train.checkpoint_writer import Snapshot, take_snapshot, write_files, write_index
from r1kern.train.optimizer import ensure_state
from r1kern.train.policy import Policy

STATE = "state.json"
SCRATCH = ".tmp"

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
    """The checkpoints of one run; made and used by all ranks together.

    What continuing needs and where it is:

    * weights, expert biases, master weights, moments, the optimizer's step: Megatron's files,
      which any layout of the same model can load;
    * the same of a critic, where the run has one, in the same files under `critic.`;
    * learning-rate schedule, weight version, step (which places the metrics), and what the loop's
      `state` adds (data cursor and its data set, sampling options): `state.json`;
    * python, numpy, torch and CUDA random states of every rank: `random_RANK.pt`, used when the
      world has the size it had;
    * not here: the reference model, which is read from `model.path` again, and the graded rollouts
      of the step in work, which lie in the run's `rollouts/` (see `GRPO.restore`).

    Args:
        folder: of the run; they live in its `checkpoints/`.
        keep_last: older ones are removed after a save.
        background: `save` returns once the state is copied to host memory, and a thread writes it.
        deadline_s: how long a rank's writing waits for the others'.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, background: bool = False, deadline_s: float = 600.0
    ):
        self.folder = folder / "checkpoints"
        self._keep_last = keep_last
        self._background = background
        # The writing threads agree through a group of their own, beside the trainer's collectives.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return (self._whole() or [None])[-1]

    def _whole(self) -> list[Path]:
        found = sorted(self.folder.glob("step_[0-9]*"))
        return [path for path in found if path.is_dir() and path.suffix != SCRATCH]

    @property
    def in_flight(self) -> bool:
        """A save has begun that `finish` has not seen the end of."""
        return self._writing is not None

    def save(self, policy: Policy, step: int, state: dict, *, critic: Policy | None = None) -> None:
        """Write everything that continuing after `step` steps needs; collective.

        An earlier save that is still being written is waited for.

        Args:
            state: JSON values of the loop (data cursor, ...).
            critic: the second model of the run.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints stand.
        """
        self.finish()
        final = self.folder / f"step_{step:06d}"
        extra = {"step": step, "world_size": dist.get_world_size(), **_progress(policy)}
        if critic is not None:
            extra["critic"] = _progress(critic)
        try:
            snapshot = self._snapshot(policy, critic, final.with_suffix(SCRATCH))
        except FAILURES as error:
            raise self._failure(final, _one_line(error)) from error
        random_state = _random_state()
        future = self._thread.submit(
            self._write, final, snapshot, random_state, json.dumps({**state, **extra})
        )
        self._writing = _Writing(final, future, policy.world.device)
        if not self._background:
            self.finish()

    def finish(self, *, wait: bool = True) -> None:
        """See a save in flight through, or, without `wait`, look whether it is done; collective.

        Raises:
            UserError: it could not be written; earlier checkpoints stand.
        """
        if self._writing is None:
            return
        final, future, device = self._writing
        if wait:
            futures.wait([future])
        done = torch.tensor([float(future.done())], device=device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if not done.item():
            return
        self._writing = None
        failure = future.result()
        if failure:
            raise self._failure(final, failure)

    def close(self) -> None:
        """Let this rank's part of a save in flight end; for a run that ends by an error."""
        self._thread.shutdown(wait=True)

    def _failure(self, final: Path, why: str) -> UserError:
        return UserError(
            f"checkpoint {final} could not be written ({why}): free some space, see that the "
            f"folder can be written, and --resume; the last good checkpoint is "
            f"{self.latest() or 'none'}"
        )

    def _snapshot(self, policy: Policy, critic: Policy | None, scratch: Path) -> Snapshot:
        if dist.get_rank() == 0:
            for left in self.folder.glob(f"*{SCRATCH}"):  # of a process that was killed
                shutil.rmtree(left)
        dist.barrier()
        scratch.mkdir(parents=True, exist_ok=True)
        models = [policy.model] if critic is None else [policy.model, critic.model]
        live = [t for model in models for t in (*model.parameters(), *model.buffers())]
        return take_snapshot(_both(policy, critic, loading=False), scratch, live)

    # -- in the thread ----------------------------------------------------------------------

    def _write(self, final: Path, snapshot: Snapshot, random_state: dict, state: str) -> str | None:
        """Write this rank's files; rank 0 publishes when all have. Why it failed, or None."""
        scratch, rank = final.with_suffix(SCRATCH), dist.get_rank()
        mine, everybody = (None, None), [None] * dist.get_world_size()
        try:
            torch.save(random_state, scratch / f"random_{rank}.pt")
            mine = write_files(snapshot), None
        except Exception as error:  # whatever it is, the ranks that wait must hear of it
            mine = None, f"rank {rank}: {type(error).__name__}: {_one_line(error)}"
        try:
            dist.gather_object(mine, everybody if rank == 0 else None, 0, self._group)
            failure = [self._publish(final, snapshot, everybody, state) if rank == 0 else None]
            dist.broadcast_object_list(failure, 0, self._group)
        except RuntimeError as error:  # another rank is gone or too slow
            return f"rank {rank}: {_one_line(error)}"
        return failure[0]

    def _publish(self, final: Path, snapshot: Snapshot, results: list, state: str) -> str | None:
        failed = [failure for _, failure in results if failure]
        if failed:
            return failed[0]
        scratch = final.with_suffix(SCRATCH)
        try:
            write_index(snapshot, scratch, [result for result, _ in results])
            (scratch / STATE).write_text(state)
            _sync_to_disk(scratch)
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            for old in self._whole()[: -self._keep_last]:
                shutil.rmtree(old)
        except FAILURES as error:
            return _one_line(error)
        return None

    # -- back -------------------------------------------------------------------------------

    def load(self, policy: Policy, path: Path, *, critic: Policy | None = None) -> dict:
        """Put models and this rank's random state where they were; returns the loop's state.

        Raises:
            UserError: not a checkpoint of ours, cut short, of another model, or unsafe.
        """
        if not (path / STATE).is_file():
            raise UserError(
                f"{path} is not an r1kern checkpoint (no {STATE}): give a folder named "
                f"step_NNNNNN from a run's checkpoints/"
            )
        refuse_unsafe_pickle(path / ".metadata")
        wanted = _both(policy, critic, loading=True)
        try:
            state = json.loads((path / STATE).read_text())
            if critic is not None and "critic" not in state:
                raise UserError(
                    f"checkpoint {path} is of a run without a critic: go on with `r1kern train`, "
                    f"or set another run.folder"
                )
            random_state = None
            if state["world_size"] == dist.get_world_size():
                random_state = torch.load(path / f"random_{dist.get_rank()}.pt", weights_only=True)
            loaded = dist_checkpointing.load(wanted, str(path))
        except (*FAILURES, json.JSONDecodeError) as error:
            raise UserError(
                f"checkpoint {path} cannot be loaded ({_one_line(error)}): it is damaged or of "
                f"another model; remove it to resume from the one before"
            ) from error
        _put_back(policy, loaded, state)
        if critic is not None:
            _put_back(critic, loaded["critic"], state["critic"])
        if random_state is not None:
            _restore_random_state(random_state)
        return state


class _Writing(NamedTuple):
    """A save in flight; `future` gives why it failed, or None."""

    final: Path
    future: Future[str | None]
    device: torch.device


def _progress(policy: Policy) -> dict:
    """What is neither weights nor the optimizer's, as JSON values."""
    return {"version": policy.version, "scheduler": policy.scheduler.state_dict()}


def _put_back(policy: Policy, loaded: dict, progress: dict) -> None:
    policy.model.load_state_dict(loaded["model"], strict=False)
    policy.optimizer.load_state_dict(loaded["optimizer"])
    fp8.forget(policy.model)
    policy.scheduler.num_steps = 0  # its `load_state_dict` adds to it
    policy.scheduler.load_state_dict(progress["scheduler"])
    policy.version = progress["version"]


def _both(policy: Policy, critic: Policy | None, *, loading: bool) -> dict:
    state = _sharded_state(policy, loading=loading)
    if critic is not None:
        state["critic"] = _sharded_state(critic, loading=loading)
        add_prefix_for_sharding(state["critic"], "critic.")
    return state


def _sharded_state(policy: Policy, *, loading: bool) -> dict:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    model = policy.model.sharded_state_dict(metadata=metadata)
    if not loading:
        ensure_state(policy.optimizer)
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
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
