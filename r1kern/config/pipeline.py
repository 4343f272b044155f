"""`r1kern pipeline`: DeepSeek-R1's stages (arXiv 2501.12948, section 2) on one base model.

Each stage's training options are a tree of `TrainConfig` or `SFTConfig` keys laid over `rl` or
`sft`; what a stage sets itself (model, data, folder) is left out. All of them are checked before
anything starts.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from r1kern.config.sections import NonNegative, Positive, Run, Sampling, Section

Tree = dict[str, Any]
STAGES = (
    "zero",
    "cold_start",
    "reasoning_rl",
    "rejection",
    "all_scenarios",
    "distil",
)


class Launch(Section):
    """How a stage's commands are started."""

    processes: NonNegative = 0  # of torchrun on this machine; 0: one a GPU, on CPU two
    command: str | None = None  # on a cluster, such as "srun torchrun --nnodes 32 ..."


class PipelineData(Section):
    """The stages' inputs; records as in `Data`."""

    reasoning: str  # problems with answers (or tests) that rules can judge
    eval: str  # held out
    where: dict[str, list[str]] = {}
    general: str | None = None  # `problem`, `answer`, `kind`: writing, factual, self-cognition, ...
    preferences: dict[str, str] = {}  # reward model's name -> `problem`, `chosen`, `rejected`
    template: Literal["chat", "none"] = "chat"  # after R1-Zero, which has its own
    max_prompt_tokens: Positive = 1024


class Collect(Sampling):
    """Completions to choose from."""

    prompts: Positive = 1000  # the first ones of a seeded order
    samples: Positive = 4  # a prompt
    keep: Positive = 1  # at most so many a prompt


class Readable(Section):
    """What a chosen completion must be; see `rewards.readable.Limits`."""

    language: str = "en"  # where a record does not say its own
    consistency: float = Field(0.9, ge=0, le=1)  # least share of words in that language
    paragraph: Positive = 2000  # characters of a line
    repetition: float = Field(0.3, ge=0, le=1)  # largest share of repeated n-grams
    ngram: Positive = 8
    code_blocks: bool = False


class ColdStart(Section):
    """Section 2.3.1: thousands of long chains of thought, by four routes."""

    examples: str | None = None  # records `problem`, `completion` that the few-shot prompt shows
    shots: Positive = 1
    example: str = "Question: {problem}\nAnswer: {completion}\n\n"
    few_shot: str = "{examples}Question: {problem}\nAnswer: "
    detailed: str = (
        "Question: {problem}\nExplain every step in detail within <think> </think> tags, reflect "
        "on it and verify the result; then give the answer within <answer> </answer> tags.\n"
        "Answer: "
    )
    routes: list[Literal["few_shot", "detailed", "zero"]] = ["few_shot", "detailed", "zero"]
    collect: Collect = Collect()
    readable: Readable = Readable()
    tags: tuple[str, str] = ("<think>", "</think>")  # around the reasoning; the summary follows
    review: Literal["none", "required"] = "none"  # people decide, see stages/review.py
    epochs: float = Field(2.0, gt=0)
    sft: Tree = {}


class Rejection(Section):
    """Section 2.3.3: rejection sampling and supervised fine-tuning from the base model."""

    collect: Collect = Collect()
    readable: Readable = Readable()
    general_share: float = Field(0.25, ge=0, lt=1)  # of all records; paper: 200k of 800k
    thought_kinds: list[str] = []  # general records given a chain of thought by the model
    epochs: float = Field(2.0, gt=0)
    sft: Tree = {}


class AllScenarios(Section):
    """Section 2.3.4: rule rewards for reasoning, reward models for general prompts."""

    general_share: float = Field(0.25, ge=0, lt=1)  # of the prompts
    summary_only: list[str] = ["helpfulness"]  # reward models that read the final summary only
    reward: Tree = {}  # `RewardConfig`
    rl: Tree = {}


class Student(Section):
    """A dense model to distil into (section 2.4)."""

    path: str | None = None  # folder; None: the one that `tiny` makes
    epochs: float = Field(2.0, gt=0)
    sft: Tree = {}
    rl: Tree | None = None  # also reinforcement learning on the student itself, to compare with


class Tiny(Section):
    """A base model and a student made here, for the demo."""

    steps: Positive = 800
    student_steps: Positive = 400
    visits: Positive = 8  # of every problem in the base model's corpus
    sft: Tree = {}


class PipelineConfig(Section):
    """`r1kern pipeline`."""

    run: Run = Run(folder="runs/pipeline")
    launch: Launch = Launch()
    stages: list[Literal[STAGES]] = list(STAGES)
    given: dict[str, str] = {}  # outputs of stages left out, as "stage.output": path
    base: str | None = None  # folder; None: `tiny` makes one
    tiny: Tiny | None = None
    data: PipelineData
    sft: Tree = {}
    rl: Tree = {}
    evaluation: Sampling = Sampling(temperature=0.6, top_p=0.95)
    evaluation_samples: Positive = 8
    zero: Tree = {}
    cold_start: ColdStart = ColdStart()
    reasoning_rl: Tree = {}
    rejection: Rejection = Rejection()
    all_scenarios: AllScenarios = AllScenarios()
    students: dict[str, Student] = {}

    @model_validator(mode="after")
    def _inputs_are_there(self):
        if (self.base is None) == (self.tiny is None):
            raise ValueError("give either base (a model folder) or tiny (make a small one here)")
        brought = self.data.general and self.data.preferences
        if "all_scenarios" in self.stages and not (brought or self.tiny):
            raise ValueError(
                "stage all_scenarios needs data.general and data.preferences: set them or leave "
                "the stage out of stages"
            )
        if "distil" in self.stages and not self.students:
            raise ValueError("stage distil needs students: name one or leave the stage out")
        for name, student in self.students.items():
            if student.path is None and self.tiny is None:
                raise ValueError(f"students.{name} needs path, its model's folder")
        return self
