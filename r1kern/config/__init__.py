"""Every option, typed and frozen: YAML plus dotted overrides, checked before anything is built."""

from r1kern.config.load import dump_config, load_config, parse_config
from r1kern.config.ppo import PPO, PPOConfig
from r1kern.config.reward import PreferenceData, RewardConfig, RewardTrain
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
    "PPO",
    "Data",
    "Eval",
    "Experts",
    "Generator",
    "Grading",
    "Judge",
    "Model",
    "Optim",
    "PPOConfig",
    "Parallel",
    "PreferenceData",
    "RecomputedPart",
    "RewardConfig",
    "RewardModel",
    "RewardTrain",
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
