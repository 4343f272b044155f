"""`r1kern eval`: benchmarks under the paper's protocol."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r1kern.config.sections import (
    Generator,
    Grading,
    NonNegative,
    Positive,
    Run,
    Sampling,
    Section,
)

Template = Literal["r1-zero", "chat", "none"]
Kind = Literal[
    "math",
    "aime",
    "amc",
    "cnmo",
    "math500",
    "gsm8k",
    "choice",
    "mmlu",
    "mmlu_pro",
    "gpqa",
    "ceval",
    "cluewsc",
    "reference",
    "humaneval",
    "mbpp",
    "livecodebench",
    "codeforces",
]


class EvalRun(Run):
    """Where results and samples go; a chunk of long completions may take long."""

    folder: str = "runs/eval"
    deadline_s: float = Field(7200.0, gt=0)  # for a chunk to be sampled, and to be graded


class EvalModel(Section):
    """The model in Hugging Face format."""

    path: str  # folder
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU
    trust_remote_code: bool = False  # run Python code that comes with tokenizer or model


class EvalParallel(Section):
    """The engines; the world holds as many as fit."""

    generator_tp: Positive = 1  # tensor parallel of one engine


class Protocol(Sampling):
    """How every benchmark is sampled (arXiv 2501.12948, section 3: k of 4 to 64)."""

    samples: Positive = 16  # k, completions of a problem
    temperature: float = Field(0.6, ge=0)  # 0: greedy, with one sample
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: Positive = 32768
    template: Template = "chat"
    chunk: NonNegative = 0  # problems sampled and kept together; 0: as many as fill an engine


class Benchmark(Section):
    """One benchmark's file, and where it departs from the protocol."""

    kind: Kind  # how its publisher writes it
    path: str  # as data.train: JSONL, JSON or parquet file, datasets folder, hub:owner/name
    samples: Positive | None = None
    max_tokens: Positive | None = None
    template: Template | None = None
    limit: NonNegative = 0  # first problems only; 0: all
    where: dict[str, list[str]] = {}  # keep the records whose field has one of these values
    since: str | None = None  # first and last contest_date (livecodebench), such as 2024-08-01
    until: str | None = None
    standings: str | None = None  # codeforces: folder of contests' standings, for the rating
    ratings: str | None = None  # codeforces: file of human ratings, for the percentile


class EvalConfig(Section):
    """`r1kern eval`."""

    run: EvalRun = EvalRun()
    model: EvalModel
    parallel: EvalParallel = EvalParallel()
    generator: Generator = Generator()
    protocol: Protocol = Protocol()
    grading: Grading = Grading()
    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    regrade: bool = False  # judge stored samples again

    @model_validator(mode="after")
    def _samples_differ(self):
        for name, benchmark in self.benchmarks.items():
            samples = benchmark.samples or self.protocol.samples
            if self.protocol.temperature == 0 and samples > 1:
                raise ValueError(
                    f"protocol.temperature = 0 (greedy) draws the same completion {samples} times "
                    f"for '{name}': set samples to 1, or the temperature to the paper's 0.6"
                )
            if "/" in name or name.startswith("."):
                raise ValueError(f"benchmark '{name}' names a folder: leave '/' and '.' out")
            rated = benchmark.standings or benchmark.ratings
            if rated and benchmark.kind != "codeforces":
                raise ValueError(f"benchmark '{name}': a rating is for the kind codeforces only")
        return self
