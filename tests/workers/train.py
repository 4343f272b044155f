"""Worker: a GRPO or PPO run with its own reward, of which one rank is SIGKILLed in given phases.

    torchrun train.py PHASE,... CONFIG OVERRIDES ... [--resume]

torchrun's first start is killed in the first phase, the next in the second, and so on ("-": none);
each kill is written to RUN_FOLDER/kills.  The phases are those of the ledger, in the third step,
and, within the save after the fourth step: "save" and "save at once" (in the middle of writing the
tensors, in the background or not), "publish" (before the checkpoint gets its name).
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from r1kern import cli, distributed
from r1kern.cli import training
from r1kern.config import PPOConfig, TrainConfig, load_config
from r1kern.report.ledger import Ledger

IN_SAVE = ("save", "save at once", "publish")


def variety(completion, prompt) -> float:
    """Share of distinct tokens: random completions differ in it."""
    return len(set(completion.ids)) / len(completion.ids)


def main(phases: list[str], config: str, overrides: list[str]) -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    phase = phases[attempt] if attempt < len(phases) else "-"
    overrides = [*overrides, f"train.async_save={phase != 'save at once'}"]
    with_critic = "ppo" in Path(config).name
    kind = PPOConfig if with_critic else TrainConfig
    options = load_config(kind, config, [o for o in overrides if o != "--resume"])
    parallel = options.parallel
    world = distributed.start(
        tp=parallel.tp,
        ep=parallel.ep,
        pp=parallel.pp,
        deadline_s=options.run.deadline_s,
        config=options.model_dump(mode="json"),
    )
    from r1kern.train import grpo, ppo

    trainer = (ppo.PPO if with_critic else grpo.GRPO)(options, world, rewards={"variety": variety})
    # Rank 0 writes the replicated tensors and publishes; for the other phases the ranks take turns.
    victim = 0 if phase in IN_SAVE else attempt % world.size
    if phase != "-" and world.rank == victim:
        arm(trainer, phase, Path(options.run.folder) / "kills")
    training.drive(trainer, "--resume" in overrides)


def arm(trainer, phase: str, log: Path) -> None:
    def die():
        with log.open("a") as file:
            file.write(phase + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    if phase in ("save", "save at once"):
        from megatron.core.dist_checkpointing.strategies import filesystem_async as module

        module._write_item = dying(module._write_item, trainer, die, calls=20)
    elif phase == "publish":
        from r1kern.train import checkpoint as module

        module._sync_to_disk = dying(module._sync_to_disk, trainer, die, calls=1)
    else:
        trainer.ledger = MortalLedger(trainer, phase, die)


def dying(function, trainer, die, *, calls: int):
    """`function`, which dies in its `calls`-th call after the fourth step."""
    left = iter(range(calls - 1))

    @functools.wraps(function)  # Megatron looks at its signature
    def wrapped(*args, **kwargs):
        if trainer.done == 4 and next(left, None) is None:
            die()
        return function(*args, **kwargs)

    return wrapped


class MortalLedger(Ledger):
    """Dies at some moment within a phase of the third step, at its end at the latest."""

    def __init__(self, trainer, phase: str, die):
        super().__init__(trainer.config.run.deadline_s)
        self._trainer, self._phase, self._die = trainer, phase, die

    @contextmanager
    def __call__(self, phase: str):
        mine = phase == self._phase and self._trainer.done == 2
        if mine:
            threading.Timer(random.uniform(0, 0.2), self._die).start()
        with super().__call__(phase):
            yield
            if mine:
                self._die()


if __name__ == "__main__":
    sys.argv, arguments = sys.argv[:1], sys.argv[1:]
    code = cli.guarded(lambda: main(arguments[0].split(","), arguments[1], arguments[2:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
