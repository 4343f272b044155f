"""Stage 4, section 2.3.3: rejection sampling from stage 3, general data, fine-tuning from the base.

Reasoning: several completions a prompt, the correct and readable ones kept. General data: the
records' own answers; for the kinds that ask for it a chain of thought prompted from the model, for
simple queries none. The paper trains two epochs on about 600k and 200k records.
"""

from __future__ import annotations

import random
from collections import Counter

from r1kern.data.records import Record, read_records
from r1kern.rewards.format import parts
from r1kern.stages.actions import fine_tune, sample, write_jsonl
from r1kern.stages.choose import choose, unreadable
from r1kern.stages.pipeline import Context, Result, Stage
from r1kern.stages.settings import Settings


def stage(settings: Settings) -> Stage:
    options, general = settings.config.rejection, settings.config.data.general
    inputs = {
        "base": settings.base,
        "model": "reasoning_rl.model",
        "problems": "data.reasoning",
        "eval": "data.eval",
    }
    if general or settings.config.tiny:
        inputs["general"] = general or "tiny.general"

    def run(context: Context) -> Result:
        reasoning, counts, dropped = _reasoning(context, settings)
        talk, more = _general(context, settings, len(reasoning))
        counts |= {"reasoning": len(reasoning), "general": len(talk)}
        records = reasoning + talk
        random.Random(settings.seed).shuffle(records)
        data = write_jsonl(context.folder / "data.jsonl", records)
        model = fine_tune(
            context,
            settings.rejection,
            model=context.inputs["base"],
            data=data,
            epochs=options.epochs,
        )
        return Result(
            {"model": model, "data": data},
            counts,
            dropped + more,
            {"after": settings.measure(context, model)},
            run=context.folder,
        )

    return Stage("rejection", run, inputs, settings.recorded(options, settings.rejection), "sft")


def _reasoning(context: Context, settings: Settings) -> tuple[list[dict], dict, Counter]:
    options = settings.config.rejection
    problems = read_records(context.inputs["problems"])
    rng = random.Random(f"{settings.seed}:rejection")
    problems = rng.sample(problems, min(options.collect.prompts, len(problems)))
    rollouts = sample(
        context,
        "samples",
        model=context.inputs["model"],
        data=write_jsonl(context.folder / "prompts.jsonl", [r.values for r in problems]),
        template=settings.config.data.template,
        **settings.sampling(options.collect),
    )
    kept, dropped = choose(rollouts, options.readable, keep=options.collect.keep)
    rows = [
        {
            "id": f"{prompt.id}:{number}",
            "problem": prompt.question,
            "completion": completion.text,
            "source": "reasoning",
        }
        for number, (prompt, completion) in enumerate(kept)
    ]
    counts = {
        "prompts": len(problems),
        "sampled": sum(len(r.completions) for r in rollouts),
        "prompts with one kept": len({prompt.id for prompt, _ in kept}),
    }
    return rows, counts, dropped


def _general(context: Context, settings: Settings, reasoning: int) -> tuple[list[dict], Counter]:
    """General records in the share asked for, again and again where there are too few of them."""
    if "general" not in context.inputs:
        return [], Counter()
    share = settings.config.rejection.general_share
    records = read_records(context.inputs["general"])
    thoughts, dropped = _thoughts(context, settings, records)
    wanted = round(reasoning * share / (1 - share))
    order = random.Random(f"{settings.seed}:general").sample(records, len(records))
    rows = []
    for number in range(wanted):
        record = order[number % len(order)]
        name = record.scalar("id")
        thought = thoughts.get(name, "")
        rows.append(
            {
                "id": f"{name}:{number}",
                "problem": record.text("problem"),
                "completion": settings.completion(thought, record.text("answer")),
                "source": record.values.get("kind", "general"),
            }
        )
    return rows, dropped


def _thoughts(
    context: Context, settings: Settings, records: list[Record]
) -> tuple[dict[str, str], Counter]:
    """A chain of thought by record, prompted from the base model, where its kind asks for one."""
    options = settings.config.rejection
    asked = [r for r in records if r.values.get("kind") in options.thought_kinds]
    if not asked:
        return {}, Counter()
    rollouts = sample(
        context,
        "thoughts",
        model=context.inputs["base"],
        data=write_jsonl(
            context.folder / "asked.jsonl", [{**r.values, "task": "general"} for r in asked]
        ),
        template="r1-zero",
        **settings.sampling(options.collect.model_copy(update={"samples": 1})),
    )
    thoughts, dropped = {}, Counter()
    for rollout in rollouts:
        completion = rollout.completions[0]
        reason = unreadable(completion, rollout.prompt, options.readable)
        if reason is None:
            thoughts[rollout.prompt.id] = parts(completion.text).reasoning
        else:
            dropped[f"thought: {reason}"] += 1
    return thoughts, dropped
