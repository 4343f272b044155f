"""Worker: a GRPO run with a reward of its own, SIGKILLed after KILL_AFTER steps when not 0.

torchrun train.py KILL_AFTER CONFIG OVERRIDES ... [--resume]
"""

from __future__ import annotations

import os
import signal
import sys

from r1kern import distributed
from r1kern.config import TrainConfig, load_config
from r1kern.errors import Interrupted


def variety(completion, prompt) -> float:
    """Share of distinct tokens: random completions differ in it."""
    return len(set(completion.ids)) / len(completion.ids)


def main(kill_after: int, config: str, overrides: list[str]) -> int:
    options = load_config(TrainConfig, config, [o for o in overrides if o != "--resume"])
    parallel = options.parallel
    world = distributed.start(tp=parallel.tp, ep=parallel.ep, pp=parallel.pp)
    from r1kern.train import grpo, loop

    trainer = grpo.GRPO(options, world, rewards={"variety": variety})
    if kill_after:
        die_at(trainer, kill_after)
    try:
        loop.run(trainer, resume="--resume" in overrides)
    except Interrupted as stop:
        print(stop)
        return 130
    return 0


def die_at(trainer, steps: int) -> None:
    """SIGKILL both ranks in the step after `steps` whole ones: no handler, no clean-up."""
    step = trainer.step

    def step_or_die():
        if trainer.done == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    trainer.step = step_or_die


if __name__ == "__main__":
    code = main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    os._exit(code)
