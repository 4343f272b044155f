"""Every option, typed and frozen: YAML plus dotted overrides, checked before anything is built."""

from r1kern.config.evaluation import Benchmark, EvalConfig, Protocol
from r1kern.config.judge import JudgeConfig
from r1kern.config.load import dump_config, load_config, parse_config
from r1kern.config.pipeline import PipelineConfig
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
    "Benchmark",
    "Data",
    "Eval",
    "EvalConfig",
    "Experts",
    "Generator",
    "Grading",
    "Judge",
    "JudgeConfig",
    "Model",
    "Optim",
    "PPOConfig",
    "Parallel",
    "PipelineConfig",
    "PreferenceData",
    "Protocol",
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
