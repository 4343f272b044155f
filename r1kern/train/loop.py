"""What GRPO and SFT share around their step: run folder, resume, saving, interruption, the log."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from r1kern.config import SFTConfig, TrainConfig, dump_config
from r1kern.distributed import World
from r1kern.errors import Interrupted, UserError
from r1kern.report.ledger import Ledger
from r1kern.report.metrics import MetricsLog
from r1kern.train.checkpoint import Checkpoints
from r1kern.train.policy import Policy


class Trainer(Protocol):
    """What `run` drives."""

    config: TrainConfig | SFTConfig
    world: World
    policy: Policy
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
        The folder of the final model, in Hugging Face format.

    Raises:
        Interrupted: by a signal, after a checkpoint.
        UserError: the folder holds another run and `resume` is not set; the disk is full.
    """
    options, policy = trainer.config.train, trainer.policy
    folder = Path(trainer.config.run.folder)
    checkpoints = Checkpoints(folder, keep_last=options.keep_last)
    first = _begin(trainer, folder, checkpoints, resume)
    log = MetricsLog(
        folder, total_steps=options.steps, first_step=first, active=trainer.world.is_main
    )
    saved = first
    with _stop_requests(trainer.world) as stop_requested:
        try:
            trainer.ledger.close_step()  # what building took belongs to no step
            if first == 0:
                _evaluate(trainer, log, 0)
            for step in range(first, options.steps):
                metrics = trainer.step()
                done = step + 1
                stop = stop_requested()
                if stop or done == options.steps or _due(done, options.save_every):
                    with trainer.ledger("save"):
                        policy.host_copies.back()
                        checkpoints.save(policy, done, trainer.state())
                    saved = done
                seconds = trainer.ledger.close_step()
                metrics["tokens_per_s"] = metrics["tokens"] / seconds["step"]
                log.step(step, metrics, seconds)
                if stop:
                    raise Interrupted(f"stopped after step {done}; continue with --resume")
                if done == options.steps or _due(done, options.eval_every):
                    _evaluate(trainer, log, done)
            policy.save_hf(folder / "model")
        except UserError as error:
            error.add_note(f"last checkpoint: step {saved}")
            raise
        finally:
            log.close()
    dist.barrier()
    return folder / "model"


def _begin(trainer: Trainer, folder: Path, checkpoints: Checkpoints, resume: bool) -> int:
    """Claim the folder; the number of steps already done."""
    latest = checkpoints.latest()
    if latest is not None and not resume:
        raise UserError(
            f"{folder} already holds a run ({latest.name}): pass --resume to continue it or set "
            f"run.folder to another folder"
        )
    dist.barrier()  # nobody writes before everybody has looked
    if trainer.world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(trainer.config))
    if latest is None:
        return 0
    state = checkpoints.load(trainer.policy, latest)
    trainer.restore(state)
    return state["step"]


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
    """Within the block SIGINT and SIGTERM set a flag; yields a function all ranks call together."""
    caught = torch.zeros(1, device=world.device)

    def remember(number, frame):
        caught.fill_(1)

    before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def requested() -> bool:
        agreed = caught.clone()
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return bool(agreed.item())

    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
