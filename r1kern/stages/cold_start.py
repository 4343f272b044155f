"""Stage 2, section 2.3.1: long chains of thought by four routes, then fine-tuning from the base.

The routes: few-shot prompting with a long chain of thought as an example, prompting for detailed
answers with reflection and verification, readable outputs of R1-Zero, and people's post-processing
(`stages.review`). What is unreadable or wrong is left out.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from r1kern.data.records import Record, read_records
from r1kern.errors import UserError
from r1kern.stages import review
from r1kern.stages.actions import fine_tune, sample, write_jsonl
from r1kern.stages.choose import choose, in_format
from r1kern.stages.pipeline import Context, Result, Stage
from r1kern.stages.settings import Settings


def stage(settings: Settings) -> Stage:
    options = settings.config.cold_start
    inputs = {"base": settings.base, "problems": "data.reasoning", "eval": "data.eval"}
    if "zero" in options.routes:
        inputs["zero"] = "zero.model"
    if options.examples:
        inputs["examples"] = options.examples
    elif settings.config.tiny:
        inputs["examples"] = "tiny.examples"

    def run(context: Context) -> Result:
        chosen, counts, dropped = _collect(context, settings)
        data = context.folder / "data.jsonl"
        if options.review == "required":
            reviewed = review.export(context.folder / "review.jsonl", chosen)
            chosen, decisions = review.decided(reviewed)
            counts |= {f"reviewed: {key}": count for key, count in decisions.items()}
        write_jsonl(data, chosen)
        model = fine_tune(
            context,
            settings.cold_start,
            model=context.inputs["base"],
            data=data,
            epochs=options.epochs,
        )
        return Result(
            {"model": model, "data": data},
            counts,
            dropped,
            {"after": settings.measure(context, model)},
            run=context.folder,
        )

    return Stage("cold_start", run, inputs, settings.recorded(options, settings.cold_start), "sft")


def _collect(context: Context, settings: Settings) -> tuple[list[dict], dict, Counter]:
    """Records to train on (`id`, `problem`, `completion`, `route`), counts and drop reasons."""
    options = settings.config.cold_start
    problems = read_records(context.inputs["problems"])
    rng = random.Random(f"{settings.seed}:cold start")
    problems = rng.sample(problems, min(options.collect.prompts, len(problems)))
    original = {record.scalar("id"): record.text("problem") for record in problems}
    sampled, chosen, dropped = 0, [], Counter()
    for source, routes in (("base", ("few_shot", "detailed")), ("zero", ("zero",))):
        rows = _prompts(problems, [r for r in routes if r in options.routes], context, settings)
        if not rows:
            continue
        rollouts = sample(
            context,
            f"samples_{source}",
            model=context.inputs[source],
            data=write_jsonl(context.folder / f"prompts_{source}.jsonl", rows),
            template="none" if source == "base" else "r1-zero",
            **settings.sampling(options.collect),
        )
        sampled += sum(len(rollout.completions) for rollout in rollouts)
        kept, reasons = choose(rollouts, options.readable, keep=options.collect.keep)
        dropped += reasons
        for number, (prompt, completion) in enumerate(kept):
            route, _, name = prompt.id.partition(":")
            text = in_format(completion.text, options.tags)
            row = {"id": f"{prompt.id}:{number}", "problem": original[name], "completion": text}
            chosen.append({**row, "route": route})
    if not chosen:
        raise UserError(
            f"no route gave a correct and readable chain of thought ({dict(dropped)}): sample more "
            "(cold_start.collect) or relax cold_start.readable"
        )
    routes = Counter(row["route"] for row in chosen)
    counts = {"sampled": sampled, **{f"kept: {k}": n for k, n in routes.items()}}
    return chosen, counts, dropped


def _prompts(
    problems: list[Record], routes: list[str], context: Context, settings: Settings
) -> list[dict]:
    options = settings.config.cold_start
    rows = []
    for route in routes:
        rng = random.Random(f"{settings.seed}:{route}")
        shown = _examples(context, settings) if route == "few_shot" else []
        for record in problems:
            problem = record.text("problem")
            text = problem
            if route == "few_shot":
                others = [e for e in shown if e["problem"] != problem]
                picked = rng.sample(others, min(options.shots, len(others)))
                examples = "".join(options.example.format(**example) for example in picked)
                text = options.few_shot.format(examples=examples, problem=problem)
            elif route == "detailed":
                text = options.detailed.format(problem=problem)
            rows.append({**record.values, "id": f"{route}:{record.scalar('id')}", "problem": text})
    return rows


def _examples(context: Context, settings: Settings) -> list[dict[str, str]]:
    path: Path | None = context.inputs.get("examples")
    if path is None:
        raise UserError(
            "cold_start.routes has few_shot, which shows long chains of thought: name a file of "
            "records with problem and completion as cold_start.examples, or leave the route out"
        )
    return [
        {"problem": record.text("problem"), "completion": record.text("completion")}
        for record in read_records(path)
    ]
