"""Commands that train: under torchrun, or in this one process."""

from __future__ import annotations

import os
from pathlib import Path

from r1kern.cli.application import Config, Overrides, Resume, app
from r1kern.watch import deadline


@app.command()
def train(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Reinforcement learning with GRPO. Start it with torchrun to use several processes."""
    from r1kern.config import TrainConfig, load_config

    options = load_config(TrainConfig, config, overrides or [])
    world = start(options)
    from r1kern.train.grpo import GRPO

    with deadline("building model and generator", options.run.deadline_s):
        trainer = GRPO(options, world)
    drive(trainer, resume)


@app.command()
def ppo(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Reinforcement learning with PPO and a value model, the baseline that GRPO replaces."""
    from r1kern.config import PPOConfig, load_config

    options = load_config(PPOConfig, config, overrides or [])
    world = start(options)
    from r1kern.train.ppo import PPO

    with deadline("building policy, critic and generator", options.run.deadline_s):
        trainer = PPO(options, world)
    drive(trainer, resume)


@app.command()
def sft(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Supervised fine-tuning on (problem, completion) records: the cold start."""
    from r1kern.config import SFTConfig, load_config

    options = load_config(SFTConfig, config, overrides or [])
    world = start(options)
    from r1kern.train.sft import SFT

    with deadline("building model", options.run.deadline_s):
        trainer = SFT(options, world)
    drive(trainer, resume)


@app.command()
def reward(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """A reward model from (problem, chosen, rejected) records: a scalar head, Bradley-Terry."""
    from r1kern.config import RewardConfig, load_config

    options = load_config(RewardConfig, config, overrides or [])
    world = start(options)
    from r1kern.train.reward_model import RewardTrainer

    with deadline("building model", options.run.deadline_s):
        trainer = RewardTrainer(options, world)
    drive(trainer, resume)


def start(options):
    import torch

    from r1kern import __version__, distributed
    from r1kern.hf.config import check_layout, read_hf_config

    parallel = options.parallel
    hf = read_hf_config(options.model.path)
    check_layout(hf, parallel, int(os.environ.get("WORLD_SIZE", "1")))
    return distributed.start(
        tp=parallel.tp,
        ep=parallel.ep,
        pp=parallel.pp,
        seed=options.run.seed,
        deadline_s=options.run.deadline_s,
        record_folder=Path(options.run.folder) / "collectives",
        config={"r1kern": __version__, "torch": torch.__version__}
        | options.model_dump(mode="json"),
    )


def drive(trainer, resume: bool) -> None:
    from r1kern import distributed
    from r1kern.train import loop

    model = loop.run(trainer, resume=resume)
    if trainer.world.is_main:
        print(f"final model: {model}")
    distributed.shutdown()
