"""`r1kern ppo`."""

from __future__ import annotations

from pydantic import Field, model_validator

from r1kern.config.sections import GRPO, NonNegative, Optim, Section
from r1kern.config.train import TrainConfig

# What of the section `grpo` has no meaning where a critic gives each token its own advantage.
GROUP_OPTIONS = ("kl", "normalizer", "ratio", "advantage_std")


class PPO(Section):
    """The critic and the advantages; see `train.advantage` and `train.ppo` for each term's source.

    Clip, KL weight, entropy, updates a batch and importance cap are those of the section `grpo`.
    """

    gamma: float = Field(1.0, gt=0, le=1)  # discount of later rewards
    lam: float = Field(1.0, ge=0, le=1)  # of generalised advantage estimation
    whiten: bool = True  # advantages to mean 0 and deviation 1 over the step's tokens
    value_clip: float | None = Field(0.2, gt=0)  # most a value moves in one step's loss; null: off
    critic: str | None = None  # folder of the critic's first weights; null: the policy's
    critic_warmup_steps: NonNegative = 0  # first steps, in which the critic alone is trained
    optim: Optim = Optim(lr=1e-5)  # the critic's


class PPOConfig(TrainConfig):
    """`r1kern ppo`: PPO with a value model, the baseline that GRPO replaces."""

    ppo: PPO = PPO()

    @model_validator(mode="after")
    def _no_group_options(self):
        defaults = GRPO()
        for name in GROUP_OPTIONS:
            if getattr(self.grpo, name) != getattr(defaults, name):
                raise ValueError(f"grpo.{name} has no part in PPO: remove it")
        if self.ppo.critic_warmup_steps >= self.train.steps:
            raise ValueError(
                f"ppo.critic_warmup_steps = {self.ppo.critic_warmup_steps} leaves none of "
                f"train.steps = {self.train.steps} to the policy: lower it"
            )
        return self
