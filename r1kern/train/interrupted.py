"""Graded rollouts of a step that a killed process did not finish."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from r1kern.config import TrainConfig
from r1kern.distributed import World
from r1kern.report.rollouts import read_rollouts
from r1kern.types import Rollout


def sampled_by(config: TrainConfig, world: World) -> dict:
    """Everything but weights and prompts that graded rollouts depend on, as JSON values."""
    options = config.model_dump(mode="json")
    sections = ("rewards", "grading", "reward_models", "rollout", "generator", "model")
    return {
        "engines": world.size // config.parallel.generator_tp,
        "seed": config.run.seed,
        **{name: options[name] for name in sections},
    }


def interrupted_rollouts(path: Path, world: World, version: int) -> list[Rollout]:
    """The rollouts in `path`, read by rank 0 for all; none where the step had not got so far.

    Args:
        version: of the weights that they must be sampled from.
    """
    read = [[]]
    if world.is_main and path.is_file():
        rollouts = read_rollouts(path)
        if {r.weight_version for r in rollouts} == {version}:
            read = [rollouts]
    dist.broadcast_object_list(read)
    return read[0]
