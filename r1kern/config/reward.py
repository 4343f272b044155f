"""`r1kern reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r1kern.config.sections import (
    Data,
    Experts,
    Model,
    Optim,
    Parallel,
    Positive,
    Run,
    Section,
    Train,
)


class PreferenceData(Data):
    """Preferences: `problem`, `chosen` and `rejected` per record."""

    reads: Literal["summary", "response"] = "response"  # of a response with reasoning
    held_out: float = Field(0.0, ge=0, lt=1)  # share of `train` kept for evaluation


class RewardTrain(Train):
    """The loop of a reward model."""

    batch_size: Positive = 64  # pairs of one optimizer step


class RewardConfig(Section):
    """`r1kern reward`: a reward model from preferences."""

    run: Run = Run(folder="runs/reward")
    model: Model
    parallel: Parallel = Parallel()
    data: PreferenceData
    experts: Experts = Experts()
    optim: Optim = Optim(lr=1e-5)
    train: RewardTrain = RewardTrain()

    @model_validator(mode="after")
    def _one_held_out_set(self):
        if self.data.eval and self.data.held_out:
            raise ValueError(
                "data.eval and data.held_out are two sets to evaluate on: give one of them"
            )
        return self
