"""DeepSeek-R1's stages (arXiv 2501.12948, section 2), built from a `PipelineConfig`."""

from __future__ import annotations

from pathlib import Path

from r1kern.config import parse_config
from r1kern.config.pipeline import STAGES, PipelineConfig
from r1kern.data.records import read_records
from r1kern.errors import UserError
from r1kern.stages import all_scenarios, cold_start, distil, rejection, tiny
from r1kern.stages.actions import accuracy_of_run, reinforce, write_jsonl
from r1kern.stages.commands import merged
from r1kern.stages.pipeline import Context, Result, Stage
from r1kern.stages.settings import Settings


def deepseek_r1(config: PipelineConfig) -> list[Stage]:
    """The stages named in `config.stages`, and those that make their inputs.

    Raises:
        UserError: one line with all that is wrong in the stages' options; an input of a stage is
            made by no stage and not in `given`.
    """
    settings = Settings(config)
    _check(settings)
    made = [_data(settings)]
    if config.tiny:
        made.append(tiny.stage(settings))
    builders = {
        "zero": _zero,
        "cold_start": cold_start.stage,
        "reasoning_rl": _reasoning_rl,
        "rejection": rejection.stage,
        "all_scenarios": all_scenarios.stage,
        "distil": distil.stage,
    }
    made += [builders[name](settings) for name in STAGES if name in config.stages]
    return [_with_given(stage, made, config) for stage in made]


def _data(settings: Settings) -> Stage:
    """The problems as every stage reads them."""
    data = settings.config.data

    def run(context: Context) -> Result:
        outputs, counts = {}, {}
        for name, source in (("reasoning", data.reasoning), ("eval", data.eval)):
            records = read_records(source, where=data.where)
            rows = [{"id": record.at, **record.values} for record in records]
            outputs[name] = write_jsonl(context.folder / f"{name}.jsonl", rows)
            counts[name] = len(rows)
        return Result(outputs, counts)

    return Stage("data", run, options=data.model_dump(mode="json"), kind="collect")


def _zero(settings: Settings) -> Stage:
    """Stage 1, section 2.2: R1-Zero. GRPO on the base model, Table 1's template, rule rewards."""
    return _rl_stage("zero", settings, settings.zero, settings.base)


def _reasoning_rl(settings: Settings) -> Stage:
    """Stage 3, section 2.3.2: as R1-Zero from the cold start, language consistency summed in."""
    return _rl_stage("reasoning_rl", settings, settings.reasoning_rl, "cold_start.model")


def _rl_stage(name: str, settings: Settings, options: dict, model: str) -> Stage:
    def run(context: Context) -> Result:
        paths = {"train": str(context.inputs["problems"]), "eval": str(context.inputs["eval"])}
        trained = reinforce(
            context, merged(options, {"data": paths}), model=context.inputs["model"]
        )
        return Result(
            {"model": trained},
            accuracy=accuracy_of_run(context.folder, context.inputs["eval"], settings.samples),
            run=context.folder,
        )

    inputs = {"model": model, "problems": "data.reasoning", "eval": "data.eval"}
    return Stage(name, run, inputs, options, kind="train")


def _check(settings: Settings) -> None:
    """All stages' options against their commands' own rules, before anything starts."""
    wrong = []
    for name, kind, options in settings.trees():
        somewhere = {"model": {"path": "checked-later"}, "data": {"train": "checked-later"}}
        try:
            parse_config(kind, merged(options, somewhere), name)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))


def _with_given(stage: Stage, made: list[Stage], config: PipelineConfig) -> Stage:
    """The stage with inputs that nobody makes taken from `given`."""
    names = {s.name for s in made}
    inputs = {}
    for label, source in stage.inputs.items():
        maker = source.partition(".")[0]
        if maker in names or maker not in (*STAGES, "data", "tiny"):
            inputs[label] = source
        elif source in config.given:
            inputs[label] = _existing(source, config.given[source])
        else:
            raise UserError(
                f"stage '{stage.name}' needs {source}: add '{maker}' to stages, or give the path "
                f"as given: {{{source}: PATH}}"
            )
    return Stage(stage.name, stage.run, inputs, stage.options, stage.kind)


def _existing(source: str, path: str) -> str:
    if not Path(path).exists():
        raise UserError(f"given.{source}: there is no {path}: correct the path")
    return path
