"""Stage 5, section 2.3.4: reinforcement learning for all scenarios.

Rule rewards for reasoning prompts; for general ones preference reward models, trained here: of
helpfulness on the final summary only, of harmlessness on the whole response.
"""

from __future__ import annotations

import random
from pathlib import Path

from r1kern.data.records import read_records
from r1kern.report.metrics import read_metrics
from r1kern.stages.actions import accuracy_of_run, reinforce, train_reward_model, write_jsonl
from r1kern.stages.commands import merged
from r1kern.stages.pipeline import Context, Result, Stage
from r1kern.stages.settings import Settings


def stage(settings: Settings) -> Stage:
    options, data = settings.config.all_scenarios, settings.config.data
    preferences = data.preferences or {n: f"tiny.{n}" for n in ("helpfulness", "harmlessness")}
    inputs = {
        "model": "rejection.model",
        "problems": "data.reasoning",
        "eval": "data.eval",
        "general": data.general or "tiny.general",
        **{f"preferences: {name}": source for name, source in preferences.items()},
    }

    def reads(name: str) -> str:
        return "summary" if name in options.summary_only else "response"

    def run(context: Context) -> Result:
        models = {
            name: train_reward_model(
                context,
                merged(settings.reward, {"data": {"reads": reads(name)}}),
                name=name,
                model=context.inputs["model"],
                data=context.inputs[f"preferences: {name}"],
            )
            for name in preferences
        }
        prompts, counts = _prompts(context, settings)
        scored_by = {n: {"path": str(path), "reads": reads(n)} for n, path in models.items()}
        weights = {"accuracy": 1.0, "language": 1.0, **dict.fromkeys(models, 1.0)}
        tree = merged(
            {"rewards": settings.all_scenarios["rewards"] or weights},
            {k: v for k, v in settings.all_scenarios.items() if k != "rewards"},
            {"reward_models": scored_by},
            {"data": {"train": str(prompts), "eval": str(context.inputs["eval"])}},
        )
        trained = reinforce(context, tree, model=context.inputs["model"])
        return Result(
            {"model": trained, **{f"reward model: {n}": p for n, p in models.items()}},
            counts,
            accuracy=accuracy_of_run(context.folder, context.inputs["eval"], settings.samples),
            run=context.folder,
            notes=[*_reward_models(context.folder, models), *_terms(context.folder, models)],
        )

    recorded = settings.recorded(options, settings.reward, settings.all_scenarios)
    return Stage("all_scenarios", run, inputs, recorded, kind="train")


def _prompts(context: Context, settings: Settings) -> tuple[Path, dict[str, int]]:
    """Reasoning problems and general prompts in the share asked for, general ones repeated."""
    share = settings.config.all_scenarios.general_share
    problems = [record.values for record in read_records(context.inputs["problems"])]
    general = [record.values for record in read_records(context.inputs["general"])]
    wanted = round(len(problems) * share / (1 - share))
    talk = [
        {**general[n % len(general)], "task": "general", "id": f"general-{n}"}
        for n in range(wanted)
    ]
    rows = problems + talk
    random.Random(f"{settings.seed}:all scenarios").shuffle(rows)
    counts = {"reasoning prompts": len(problems), "general prompts": len(talk)}
    return write_jsonl(context.folder / "prompts.jsonl", rows), counts


def _reward_models(folder: Path, models: dict[str, Path]) -> list[str]:
    lines = []
    for name in models:
        accuracies = [
            m["eval/accuracy"] for m in read_metrics(folder / name) if "eval/accuracy" in m
        ]
        if accuracies:
            lines.append(f"{name}: held-out preference accuracy {100 * accuracies[-1]:.1f} %")
    return lines


def _terms(folder: Path, models: dict[str, Path]) -> list[str]:
    """Mean of each reward model's term in the first and last fifth of the steps."""
    lines = []
    for name in models:
        values = [m[f"reward/{name}"] for m in read_metrics(folder) if m.get(f"reward/{name}")]
        fifth = max(1, len(values) // 5)
        if values:
            first, last = sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth
            lines.append(f"{name}: mean reward {first:+.2f} -> {last:+.2f} over the steps")
    return lines
