"""Every option, typed and frozen: YAML plus dotted overrides, checked before anything is built."""

from r1kern.config.judge import JudgeConfig
from r1kern.config.load import dump_config, load_config, parse_config
from r1kern.config.sections import (
    GRPO,
    Data,
    Eval,
    Experts,
    Generator,
    Grading,
    Judge,
    Model,
    Optim,
    Parallel,
    RecomputedPart,
    RewardModel,
    Rollout,
    Run,
    Sampling,
    Sandbox,
    Train,
)
from r1kern.config.train import SFTConfig, SFTTrain, TrainConfig

__all__ = [
    "GRPO",
    "Data",
    "Eval",
    "Experts",
    "Generator",
    "Grading",
    "Judge",
    "JudgeConfig",
    "Model",
    "Optim",
    "Parallel",
    "RecomputedPart",
    "RewardModel",
    "Rollout",
    "Run",
    "SFTConfig",
    "SFTTrain",
    "Sampling",
    "Sandbox",
    "Train",
    "TrainConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
