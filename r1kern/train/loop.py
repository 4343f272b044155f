"""What GRPO, SFT and reward models share: run folder, resume, saving, interruption, the log.

A run killed in the middle of a step continues from its newest whole checkpoint and does the steps
since then again, bit for bit where the kernels are deterministic.  A run that torchrun restarts
(`--max-restarts`) resumes by itself.  SIGTERM, the warning of a preemption, is heeded between
steps: where the grace period is shorter than a step, the last checkpoint is what remains.
"""

from __future__ import annotations

import errno
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from r1kern.agreement import agree
from r1kern.config import RewardConfig, SFTConfig, TrainConfig, dump_config
from r1kern.distributed import World
from r1kern.errors import Interrupted, UserError
from r1kern.report.device import Meter
from r1kern.report.html import write_report
from r1kern.report.ledger import Ledger
from r1kern.report.machine import record_machine
from r1kern.report.metrics import MetricsLog
from r1kern.report.rollouts import forget_rollouts
from r1kern.train.checkpoint import Checkpoints
from r1kern.train.policy import Policy
from r1kern.watch import deadline

JOB = "job"  # file: the torchrun job that claimed the folder


class Trainer(Protocol):
    """What `run` drives."""

    config: TrainConfig | SFTConfig | RewardConfig
    world: World
    policy: Policy
    critic: Policy | None  # a second model, trained and saved beside the policy
    ledger: Ledger

    def step(self) -> dict[str, float]:
        """One step; its metrics."""

    def evaluate(self) -> tuple[dict[str, float], str] | None:
        """Held-out metrics and a line that tells them, or None where there is nothing to do."""

    def state(self) -> dict:
        """JSON values that `restore` takes."""

    def restore(self, state: dict) -> None: ...


def run(trainer: Trainer, *, resume: bool = False) -> Path:
    """Train to the end; writes checkpoints, metrics and the final model into the run folder.

    Args:
        resume: continue from the folder's newest checkpoint, if it has one.

    Returns:
        The folder of the final model, in Hugging Face format; a critic's is `critic` beside it.

    Raises:
        Interrupted: by a signal, after a checkpoint.
        UserError: the folder holds another run and `resume` is not set, or cannot be written; the
            ranks read different data.
    """
    options = trainer.config.train
    folder = Path(trainer.config.run.folder)
    checkpoints = Checkpoints(
        folder,
        keep_last=options.keep_last,
        background=options.async_save,
        deadline_s=trainer.config.run.deadline_s,
    )
    try:
        with deadline("taking the run up", trainer.config.run.deadline_s):
            first = _begin(trainer, folder, checkpoints, resume)
        if trainer.world.is_main:
            print(f"attention kernel: {trainer.policy.config.attention_kernel}", flush=True)
        _steps(trainer, folder, checkpoints, first)
        with deadline("writing the model", trainer.config.run.deadline_s):
            trainer.policy.save_hf(folder / "model")
            if trainer.critic is not None:
                trainer.critic.save_hf(folder / "critic")
            dist.barrier()
        if trainer.world.is_main:
            write_report(folder)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"run.folder {folder} cannot be written ({error}): free some space or set another; "
            f"--resume goes on from the last checkpoint, {checkpoints.latest() or 'none'}"
        ) from error
    except UserError as error:
        error.add_note(f"last checkpoint: {checkpoints.latest() or 'none'}")
        raise
    finally:
        checkpoints.close()
    return folder / "model"


UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,  # a file of that name
    errno.ENOENT,
)


def _steps(trainer: Trainer, folder: Path, checkpoints: Checkpoints, first: int) -> None:
    options = trainer.config.train
    log = MetricsLog(
        folder, total_steps=options.steps, first_step=first, active=trainer.world.is_main
    )
    meter = Meter(trainer.world)
    try:
        with _stop_requests(trainer.world) as stop_requested:
            trainer.ledger.close_step()  # what building took belongs to no step
            if first == 0:
                _evaluate(trainer, log, 0)
            for step in range(first, options.steps):
                metrics = trainer.step()
                done, stop = step + 1, stop_requested()
                _checkpoint(trainer, checkpoints, done, last=bool(stop) or done == options.steps)
                metrics |= meter.step()
                seconds = trainer.ledger.close_step()
                metrics["tokens_per_s"] = metrics["tokens"] / seconds["step"]
                log.step(step, metrics, seconds)
                if stop:
                    raise Interrupted(f"stopped after step {done}; continue with --resume", stop)
                if done == options.steps or _due(done, options.eval_every):
                    _evaluate(trainer, log, done)
    finally:
        log.close()


def _checkpoint(trainer: Trainer, checkpoints: Checkpoints, done: int, *, last: bool) -> None:
    """Save when it is time to; otherwise see to the save in flight."""
    if last or _due(done, trainer.config.train.save_every):
        with trainer.ledger("save"):
            for model in filter(None, (trainer.policy, trainer.critic)):
                model.host_copies.back()
            checkpoints.save(trainer.policy, done, trainer.state(), critic=trainer.critic)
            if last:
                checkpoints.finish()
    elif checkpoints.in_flight:
        with trainer.ledger("save"):
            checkpoints.finish(wait=False)


def _begin(trainer: Trainer, folder: Path, checkpoints: Checkpoints, resume: bool) -> int:
    """Claim the folder; the number of steps already done."""
    agree("the training data", trainer.state(), deadline_s=trainer.config.run.deadline_s)
    latest = checkpoints.latest()
    if latest is not None and not (resume or _restarted(trainer, folder)):
        raise UserError(
            f"{folder} already holds a run ({latest.name}): pass --resume to continue it or set "
            f"run.folder to another folder"
        )
    dist.barrier()  # nobody writes before everybody has looked
    first = 0
    if latest is not None:
        state = checkpoints.load(trainer.policy, latest, critic=trainer.critic)
        first = state["step"]
    if trainer.world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(trainer.config))
        (folder / JOB).write_text(_job())
        record_machine(folder, trainer.world)
        # Of the steps to come only the first one's were sampled from the weights at hand.
        forget_rollouts(folder, after=first + 1 if first else 0)
    if first:
        trainer.restore(state)
    return first


def _job() -> str:
    """torchrun's name for this job, the same after a restart; "none" without one."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "none")


def _restarted(trainer: Trainer, folder: Path) -> bool:
    """torchrun has started this job again, and an earlier start had claimed the folder."""
    # On several machines only the one that failed counts its restart.
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    restarts = torch.tensor([float(count)], device=trainer.world.device)
    dist.all_reduce(restarts, op=dist.ReduceOp.MAX)
    claim = folder / JOB
    claimed = claim.is_file() and claim.read_text() == _job() != "none"
    return restarts.item() > 0 and claimed


def _evaluate(trainer: Trainer, log: MetricsLog, step: int) -> None:
    result = trainer.evaluate()
    if result is not None:
        metrics, line = result
        seconds = trainer.ledger.close_step()
        log.note(step, {**metrics, **{f"seconds/{k}": v for k, v in seconds.items()}}, line)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


@contextmanager
def _stop_requests(world: World):
    """Within the block SIGINT and SIGTERM are remembered.

    Yields a function that all ranks call together; it gives the signal's number, 0 for none.
    """
    caught = torch.zeros(1, device=world.device)

    def remember(number, frame):
        caught.fill_(number)

    before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def requested() -> int:
        agreed = caught.clone()
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return int(agreed.item())

    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
