"""What stages are made of: fine-tune, reinforce, sample, measure; each a command that resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from r1kern.config import Generator, Sampling
from r1kern.eval.heldout import summarise
from r1kern.report.metrics import read_metrics
from r1kern.report.rollouts import read_rollouts
from r1kern.stages.commands import merged, write_options
from r1kern.stages.pipeline import Context
from r1kern.types import Rollout


def fine_tune(
    context: Context, options: dict, *, model: Path, data: Path, epochs: float | None = None
) -> Path:
    """`r1kern sft`; the trained model's folder.

    Args:
        options: a tree of `SFTConfig`.
        epochs: passes over the data; None: `options` says the steps.
    """
    computed = {"model": {"path": str(model)}, "data": {"train": str(data)}}
    if epochs is not None:
        batch = options.get("train", {}).get("batch_size", 64)
        computed["train"] = {"steps": max(1, math.ceil(epochs * count_records(data) / batch))}
    return _train(context, "sft", merged(options, computed))


def reinforce(context: Context, options: dict, *, model: Path) -> Path:
    """`r1kern train`; the trained model's folder."""
    return _train(context, "train", merged(options, {"model": {"path": str(model)}}))


def train_reward_model(
    context: Context, options: dict, *, name: str, model: Path, data: Path
) -> Path:
    """`r1kern reward` in the stage's folder `name`; the trained model's folder."""
    computed = {"model": {"path": str(model)}, "data": {"train": str(data)}}
    return _train(context, "reward", merged(options, computed), name)


def _train(context: Context, command: str, options: dict, name: str = "") -> Path:
    run = context.folder / name if name else context.folder
    run.mkdir(exist_ok=True)
    if not (run / "model").is_dir():
        options = merged(options, {"run": {"folder": str(run)}})
        path = write_options(run / "options.yaml", options)
        context.commands.run(command, path, "--resume")
    return run / "model"


def sample(
    context: Context,
    name: str,
    *,
    model: Path,
    data: Path,
    template: str,
    sampling: Sampling,
    samples: int,
    generator: Generator,
    seed: int,
    generator_tp: int = 1,
) -> list[Rollout]:
    """`r1kern rollout`: graded completions of every record of `data`, kept in `NAME.jsonl`."""
    out = context.folder / f"{name}.jsonl"
    if not out.is_file():
        options = {
            "out": out,
            "samples": samples,
            "temperature": sampling.temperature,
            "top-p": sampling.top_p,
            "max-tokens": sampling.max_tokens,
            "template": template,
            "seed": seed,
            "max-seqs": generator.max_seqs,
            "kv-cache-gib": generator.kv_cache_gib,
            "generator-tp": generator_tp,
        }
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        context.commands.run("rollout", model, data, *flags)
    return read_rollouts(out)


def accuracy(rollouts: list[Rollout]) -> dict[str, float]:
    """pass@1 with its interval, as a stage reports it."""
    metrics, _ = summarise(rollouts)
    return {
        "pass@1": metrics["eval/pass@1"],
        "half_interval": metrics["eval/half_interval"],
        "problems": len(rollouts),
        "samples": len(rollouts[0].completions),
        "response_length": metrics["eval/response_length"],
    }


def accuracy_of_run(folder: Path, held_out: Path, samples: int) -> dict[str, dict[str, float]]:
    """Held-out pass@1 before and after a training run, from its own metrics."""
    problems = count_records(held_out)
    evaluations = [m for m in read_metrics(folder) if "eval/pass@1" in m]
    return {
        when: {
            "pass@1": metrics["eval/pass@1"],
            "half_interval": metrics["eval/half_interval"],
            "problems": problems,
            "samples": samples,
            "response_length": metrics["eval/response_length"],
        }
        for when, metrics in zip(
            ("before", "after"), evaluations[:1] + evaluations[-1:], strict=True
        )
    }


def count_records(path: Path) -> int:
    """Records of a JSONL file."""
    return sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line.strip())


def write_jsonl(path: Path, records: Iterable[Mapping]) -> Path:
    """Records as JSON lines; the file gets its name when it is whole."""
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    scratch.rename(path)
    return path
