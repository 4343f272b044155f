"""The command line: `r1kern train | sft | plan | rollout | demo | bench | doctor`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from r1kern.errors import Interrupted, UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="YAML file with the options, see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint")]


def main() -> None:
    """Run the command line and leave: threads of vLLM and gloo would hold the process up."""
    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code.

    A `UserError` is one line on stderr and exit code 2, an interruption after its checkpoint 130.
    """
    warnings.filterwarnings("ignore")  # the libraries' notes on deprecations are not for our users
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app(arguments)
    except SystemExit as done:  # how typer ends, bad usage included
        return done.code or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"r1kern: error{where}: {error}{notes}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"r1kern: {stop}", file=sys.stderr)
        return 130
    raise AssertionError("typer returned")


@app.command()
def train(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Reinforcement learning with GRPO. Start it with torchrun to use several processes."""
    from r1kern.config import TrainConfig, load_config

    options = load_config(TrainConfig, config, overrides or [])
    world = _start(options)
    from r1kern.train.grpo import GRPO

    _run(GRPO(options, world), resume)


@app.command()
def sft(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Supervised fine-tuning on (problem, completion) records: the cold start."""
    from r1kern.config import SFTConfig, load_config

    options = load_config(SFTConfig, config, overrides or [])
    world = _start(options)
    from r1kern.train.sft import SFT

    _run(SFT(options, world), resume)


def _start(options):
    from r1kern import distributed
    from r1kern.model.hf_config import check_layout, read_hf_config

    parallel = options.parallel
    hf = read_hf_config(options.model.path)
    check_layout(hf, parallel, int(os.environ.get("WORLD_SIZE", "1")))
    return distributed.start(
        tp=parallel.tp,
        ep=parallel.ep,
        pp=parallel.pp,
        seed=options.run.seed,
        deadline_s=options.run.deadline_s,
    )


def _run(trainer, resume: bool) -> None:
    from r1kern import distributed
    from r1kern.train import loop

    model = loop.run(trainer, resume=resume)
    if trainer.world.is_main:
        print(f"final model: {model}")
    distributed.shutdown()


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(help="GPUs; default parallel.world_size")] = None,
    hardware: Annotated[str, typer.Option(help="h100, h200, h800, h20 or b200")] = "h100",
    prompt: Annotated[float | None, typer.Option(help="mean tokens of a prompt")] = None,
    response: Annotated[float | None, typer.Option(help="mean tokens of a completion")] = None,
    json: Annotated[Path | None, typer.Option(help="write everything as JSON")] = None,
    picture: Annotated[Path | None, typer.Option(help="write memory over the step as SVG")] = None,
) -> None:
    """Size a GRPO run without a GPU: parameters, memory, traffic, modelled step time."""
    from r1kern.config import TrainConfig, load_config

    options = load_config(TrainConfig, config, overrides or [])
    from r1kern.plan.command import run as make

    made = make(
        options,
        world=world,
        hardware=hardware,
        prompt_tokens=prompt,
        response_tokens=response,
        json_file=json,
        picture=picture,
    )
    raise typer.Exit(0 if made.fits else 1)


@app.command()
def rollout(
    model: Annotated[Path, typer.Argument(help="folder in Hugging Face format")],
    data: Annotated[str, typer.Argument(help="problems: JSONL file, bundled:NAME, hub:NAME")],
    out: Annotated[Path, typer.Option(help="JSONL file to write")] = Path("rollouts.jsonl"),
    samples: Annotated[int, typer.Option(help="completions per problem")] = 8,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 1024,
    template: str = "r1-zero",
    limit: Annotated[int, typer.Option(help="first problems only; 0: all")] = 0,
    seed: int = 0,
) -> None:
    """Sample completions with vLLM, grade them, and print pass@1."""
    from r1kern.rollout import sample_and_grade

    line = sample_and_grade(
        model,
        data,
        out=out,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        template=template,
        limit=limit,
        seed=seed,
    )
    print(f"{line}\nsamples: {out}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="run folder")] = Path("runs/demo"),
    seed: int = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget an earlier demo")] = False,
) -> None:
    """Train a tiny DeepSeek-V3 to do sums: cold start, GRPO, held-out pass@1 before and after."""
    from r1kern.demo import run_demo

    raise typer.Exit(run_demo(folder, seed=seed, fresh=fresh))


@app.command()
def bench(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any")] = None,
    case: Annotated[list[str] | None, typer.Option(help="op to measure, repeatable")] = None,
    check: Annotated[bool, typer.Option("--check", help="check the ops, measure nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="keep the rows that are done")] = False,
    seconds: Annotated[float, typer.Option(help="start no row after so many")] = float("inf"),
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("benchmarks/results"),
) -> None:
    """Check every op against its reference and time it beside the best public ones."""
    from r1kern.benchmarks import kernels

    code = kernels.bench(device, case or [], out, check=check, resume=resume, seconds=seconds)
    raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Check this machine and say what to do."""
    from rich.console import Console
    from rich.table import Table

    from r1kern.doctor import report

    checks = report()
    table = Table("", "check", "found", "remedy")
    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]--[/]"}
    for check in checks:
        table.add_row(marks[check.ok], check.name, check.found, check.remedy)
    Console().print(table)
    raise typer.Exit(1 if any(check.ok is False for check in checks) else 0)
