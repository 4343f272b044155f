"""`r1kern train` and `r1kern sft`."""

from __future__ import annotations

from pydantic import model_validator

from r1kern.config.sections import (
    GRPO,
    Data,
    Eval,
    Experts,
    Generator,
    Grading,
    Model,
    Optim,
    Parallel,
    Positive,
    RewardModel,
    Rollout,
    Run,
    Section,
    Train,
)


class TrainConfig(Section):
    """`r1kern train`: GRPO."""

    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout = Rollout()
    generator: Generator = Generator()
    experts: Experts = Experts()
    rewards: dict[str, float] = {"accuracy": 1.0, "format": 1.0}  # weight of each term
    grading: Grading = Grading()
    reward_models: dict[str, RewardModel] = {}  # further terms, by name
    grpo: GRPO = GRPO()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _lengths_fit(self):
        for name, tokens in (("rollout", self.rollout), ("eval", self.eval)):
            longest = self.data.max_prompt_tokens + tokens.max_tokens
            if longest > self.model.max_positions:
                raise ValueError(
                    f"data.max_prompt_tokens + {name}.max_tokens = {longest} exceeds "
                    f"model.max_positions = {self.model.max_positions}: raise it or shorten them"
                )
            if longest > self.train.tokens_per_microbatch:
                raise ValueError(
                    f"data.max_prompt_tokens + {name}.max_tokens = {longest} exceeds "
                    f"train.tokens_per_microbatch = {self.train.tokens_per_microbatch}: raise it"
                )
        for name in self.reward_models:
            if name not in self.rewards:
                raise ValueError(f"reward_models.{name} has no weight: set rewards.{name}")
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature = 0 leaves nothing to learn from: use 1.0")
        if self.grpo.entropy_coef and self.grpo.ratio != "token":
            raise ValueError('grpo.entropy_coef needs grpo.ratio = "token"')
        if self.rollout.prompts_per_step % self.grpo.updates_per_batch:
            raise ValueError(
                f"grpo.updates_per_batch = {self.grpo.updates_per_batch} does not divide "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}"
            )
        return self


class SFTTrain(Train):
    """The loop of supervised fine-tuning."""

    batch_size: Positive = 64  # sequences of one optimizer step


class SFTConfig(Section):
    """`r1kern sft`: supervised fine-tuning on prompt and completion pairs."""

    run: Run = Run(folder="runs/sft")
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    experts: Experts = Experts()
    optim: Optim = Optim(lr=1e-5)
    train: SFTTrain = SFTTrain()
