"""The stages' training options, resolved from a `PipelineConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from r1kern.config import Generator, SFTConfig, TrainConfig
from r1kern.config.pipeline import Collect, PipelineConfig
from r1kern.config.reward import RewardConfig
from r1kern.stages.actions import accuracy, sample
from r1kern.stages.commands import merged
from r1kern.stages.pipeline import Context

R1_ZERO_REWARDS = {"accuracy": 1.0, "format": 1.0}  # section 2.2.2
REASONING_REWARDS = {"accuracy": 1.0, "language": 1.0}  # section 2.3.2: summed directly


class Settings:
    """What every stage is built from.

    Attributes:
        config: the whole.
        base: the base model, as a stage's input.
        zero, reasoning_rl, all_scenarios: trees of `TrainConfig`, without model and data files.
        cold_start, rejection: trees of `SFTConfig`.
        reward: tree of `RewardConfig`.
        samples: completions of a held-out problem.
        generator, generator_tp: of the stages that sample.
    """

    def __init__(self, config: PipelineConfig):
        self.config = config
        self.base = config.base or "tiny.model"
        self.seed, self.samples = config.run.seed, config.evaluation_samples
        self.zero = self._rl(config.zero, R1_ZERO_REWARDS, "r1-zero")
        template = config.data.template
        self.reasoning_rl = self._rl(config.reasoning_rl, REASONING_REWARDS, template)
        self.all_scenarios = self._rl(config.all_scenarios.rl, {}, template)
        self.cold_start = self.sft(config.cold_start.sft)
        self.rejection = self.sft(config.rejection.sft)
        self.reward = merged(
            config.sft,
            self._shared(),
            {"data": {"template": template}},
            config.all_scenarios.reward,
        )
        self.generator = Generator(**config.rl.get("generator", {}))
        self.generator_tp = config.rl.get("parallel", {}).get("generator_tp", 1)

    def sft(self, tree: dict) -> dict:
        """A tree of `SFTConfig` with what the stages share below it."""
        data = {"data": {"template": self.config.data.template}}
        return merged(self.config.sft, self._shared(), data, tree)

    def student_rl(self, tree: dict) -> dict:
        """A tree of `TrainConfig` for reinforcement learning on a student itself."""
        return self._rl(tree, R1_ZERO_REWARDS, "r1-zero")

    def trees(self) -> Iterator[tuple[str, type[BaseModel], dict]]:
        """Every stage's name, its command's options and the tree, of the stages that will run."""
        stages = self.config.stages
        known = [
            ("zero", TrainConfig, self.zero),
            ("cold_start", SFTConfig, self.cold_start),
            ("reasoning_rl", TrainConfig, self.reasoning_rl),
            ("rejection", SFTConfig, self.rejection),
            ("all_scenarios", RewardConfig, self.reward),
        ]
        yield from (entry for entry in known if entry[0] in stages)
        if "all_scenarios" in stages:
            models = {
                name: {"path": str(Path("checked-later"))} for name in self.config.data.preferences
            }
            yield (
                "all_scenarios",
                TrainConfig,
                merged(
                    self.all_scenarios,
                    {"reward_models": models, "rewards": dict.fromkeys(models, 1.0)},
                ),
            )
        if "distil" in stages:
            for name, student in self.config.students.items():
                yield f"students.{name}", SFTConfig, self.sft(student.sft)
                if student.rl is not None:
                    yield f"students.{name}", TrainConfig, self.student_rl(student.rl)

    def _shared(self) -> dict:
        run = self.config.run
        return {"run": {"seed": run.seed, "deadline_s": run.deadline_s}}

    def _rl(self, tree: dict, rewards: dict, template: str) -> dict:
        evaluation = self.config.evaluation.model_dump() | {"samples": self.samples}
        data = {"template": template, "max_prompt_tokens": self.config.data.max_prompt_tokens}
        defaults = {"data": data, "eval": evaluation}
        if "rewards" not in tree:
            defaults["rewards"] = rewards
        # a stage's own rewards replace the defaults, they do not join them
        below = {key: value for key, value in self.config.rl.items() if key != "rewards"}
        return merged(below, self._shared(), defaults, tree)

    # -- what the stages that sample share ------------------------------------------------------

    def sampling(self, collect: Collect) -> dict:
        """Arguments of `actions.sample` for completions to choose from."""
        return {"sampling": collect, "samples": collect.samples, **self._engine()}

    def measure(self, context: Context, model: Path, name: str = "held_out") -> dict[str, float]:
        """Held-out pass@1 of a model, its samples kept in the stage's folder."""
        rollouts = sample(
            context,
            name,
            model=model,
            data=context.inputs["eval"],
            template=self.config.data.template,
            sampling=self.config.evaluation,
            samples=self.samples,
            **self._engine(),
        )
        return accuracy(rollouts)

    def recorded(self, *parts: BaseModel | dict) -> dict:
        """A stage's options as its record keeps them."""
        plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
        return {"seed": self.seed, "options": plain}

    def _engine(self) -> dict:
        return {
            "generator": self.generator,
            "generator_tp": self.generator_tp,
            "seed": self.seed,
        }

    @staticmethod
    def completion(thought: str, answer: str) -> str:
        """Thought and answer in the template's tags."""
        return f"<think> {thought + ' ' if thought else ''}</think> <answer> {answer} </answer>"
