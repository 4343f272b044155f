"""A training checkpoint as a Hugging Face folder, in one process."""

from __future__ import annotations

from pathlib import Path

import yaml
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu

from r1kern.config import (
    Optim,
    Parallel,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
    load_config,
)
from r1kern.distributed import World
from r1kern.errors import UserError
from r1kern.hf.dtype import ExportDtype
from r1kern.train.checkpoint import FAILURES, refuse_unsafe_pickle
from r1kern.train.policy import Policy
from r1kern.train.reading_entry import reading_entry


def checkpoint_to_hf(world: World, step: Path, target: Path, dtype: ExportDtype) -> None:
    """Write the weights of `RUN/checkpoints/step_N`, made under any layout, to the new `target`.

    The whole model with its optimizer's buffers must fit this process; weights only are read.

    Args:
        world: of one process.
        step: folder of the checkpoint, in its run's folder.
        target: folder to make.
        dtype: of the weights written.

    Raises:
        UserError: `target` exists, the run's `config.yaml` is not there, or the checkpoint is
            damaged.
    """
    if target.exists():
        raise UserError(f"{target} exists: give a new name, or remove it")
    path = step.resolve().parents[1] / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path} is missing, which says what {step} was trained from: give a checkpoint in "
            f"its run's folder"
        )
    options = load_config(_kind(yaml.safe_load(path.read_text())), path)
    is_reward = isinstance(options, RewardConfig)
    model = options.model.model_copy(update={"init": "random"})
    policy = Policy(model, Parallel(), Optim(), world, total_updates=1, scalar_head=is_reward)
    if is_reward:
        policy.config_entries = reading_entry(options.data)
    refuse_unsafe_pickle(step / ".metadata")
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    wanted = {"model": policy.model.sharded_state_dict(metadata=metadata)}
    try:
        loaded = dist_checkpointing.load(wanted, str(step))
    except FAILURES as error:
        raise UserError(
            f"checkpoint {step} cannot be loaded ({' '.join(str(error).split())[:200]}): it is "
            f"damaged, convert the one before"
        ) from error
    policy.model.load_state_dict(loaded["model"], strict=False)
    policy.save_hf(target, dtype)


def _kind(options: dict) -> type[TrainConfig] | type[SFTConfig] | type[RewardConfig]:
    """The command whose resolved options these are."""
    if "ppo" in options:
        return PPOConfig
    if "rollout" in options:
        return TrainConfig
    return RewardConfig if "reads" in options["data"] else SFTConfig
