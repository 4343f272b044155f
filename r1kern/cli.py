"""The command line: `r1kern train | sft | plan | rollout | convert | demo | bench | doctor`."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from r1kern.errors import Interrupted, UserError
from r1kern.watch import deadline

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="YAML file with the options, see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint")]


def main() -> None:
    """Run the command line and leave: threads of vLLM and gloo would hold the process up."""
    if os.environ.get("RANK", "0") == "0":
        _print_notes()
    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_notes() -> None:
    """What our modules note by the way goes to stdout, as a line each."""
    notes = logging.StreamHandler(sys.stdout)
    notes.setFormatter(logging.Formatter("%(message)s"))
    notes.addFilter(lambda record: record.levelno < logging.WARNING)
    ours = logging.getLogger("r1kern")
    ours.addHandler(notes)
    ours.setLevel(logging.INFO)


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code, see `guarded`."""
    warnings.filterwarnings("ignore")  # the libraries' notes on deprecations are not for our users
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # notes on each layer's classes
    return guarded(lambda: app(arguments))


def guarded(command: Callable[[], None]) -> int:
    """Run a command to its exit code.

    A `UserError` is one line on stderr and exit code 2, an interruption after its checkpoint 130
    (Ctrl-C) or 143 (SIGTERM), as shells count signals.
    """
    try:
        command()
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
        return 128 + stop.signal
    except Exception:  # not left to the interpreter, which would wait for the libraries' threads
        traceback.print_exc()
        return 1
    return 0


@app.command()
def train(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Reinforcement learning with GRPO. Start it with torchrun to use several processes."""
    from r1kern.config import TrainConfig, load_config

    options = load_config(TrainConfig, config, overrides or [])
    world = _start(options)
    from r1kern.train.grpo import GRPO

    with deadline("building model and generator", options.run.deadline_s):
        trainer = GRPO(options, world)
    _run(trainer, resume)


@app.command()
def sft(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Supervised fine-tuning on (problem, completion) records: the cold start."""
    from r1kern.config import SFTConfig, load_config

    options = load_config(SFTConfig, config, overrides or [])
    world = _start(options)
    from r1kern.train.sft import SFT

    with deadline("building model", options.run.deadline_s):
        trainer = SFT(options, world)
    _run(trainer, resume)


def _start(options):
    import torch

    from r1kern import __version__, distributed
    from r1kern.hf.config import check_layout, read_hf_config

    parallel = options.parallel
    hf = read_hf_config(options.model.path)
    check_layout(hf, parallel, int(os.environ.get("WORLD_SIZE", "1")))
    return distributed.start(
        tp=parallel.tp,
        ep=parallel.ep,
        pp=parallel.pp,
        seed=options.run.seed,
        deadline_s=options.run.deadline_s,
        record_folder=Path(options.run.folder) / "collectives",
        config={"r1kern": __version__, "torch": torch.__version__}
        | options.model_dump(mode="json"),
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
def convert(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder or RUN/checkpoints/step_N")],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp8 (128 x 128 blocks)")] = "bf16",
) -> None:
    """Copy a model in another dtype, a tensor at a time; run it again to go on after a kill."""
    from typing import get_args

    from r1kern.hf.convert import convert as run_convert
    from r1kern.hf.dtype import ExportDtype

    if dtype not in get_args(ExportDtype):
        raise UserError(f"--dtype {dtype} is none of {', '.join(get_args(ExportDtype))}")
    if (source / "state.json").is_file():
        from r1kern import distributed

        world = distributed.start()
        from r1kern.train.checkpoint_to_hf import checkpoint_to_hf

        checkpoint_to_hf(world, source, target, dtype)
    else:
        run_convert(source, target, dtype)
    print(f"model: {target}")


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
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="a list of findings")] = False,
) -> None:
    """Check this machine and say what to do; exit code 1 where something is to be mended."""
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from r1kern.doctor import report

    checks = report()
    if as_json:
        fields = ("name", "state", "found", "remedy")
        print(json.dumps([{f: getattr(c, f) for f in fields} for c in checks], indent=1))
    else:
        table = Table("", "check", "found", "remedy")
        marks = {True: "[green]ok[/]", False: "[red]problem[/]", None: "[dim]--[/]"}
        for check in checks:
            row = (check.name, check.found, check.remedy)
            table.add_row(marks[check.ok], *map(escape, row))
        Console().print(table)
    raise typer.Exit(1 if any(check.ok is False for check in checks) else 0)
