"""Commands on model folders and layouts: plan, rollout, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1kern.cli.application import Config, Overrides, app
from r1kern.errors import UserError


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
    max_seqs: Annotated[int, typer.Option(help="completions decoded at the same time")] = 256,
    kv_cache_gib: Annotated[float, typer.Option(help="a rank's key-value cache")] = 1.0,
    generator_tp: Annotated[int, typer.Option(help="ranks of one engine")] = 1,
) -> None:
    """Sample completions with vLLM, grade them, and print pass@1; torchrun adds engines."""
    from r1kern.config import Generator
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
        generator=Generator(max_seqs=max_seqs, kv_cache_gib=kv_cache_gib),
        generator_tp=generator_tp,
    )
    if line is not None:
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
def score(
    model: Annotated[Path, typer.Argument(help="reward model, a folder made by `r1kern reward`")],
    rollouts: Annotated[Path, typer.Argument(help="JSONL file made by `r1kern rollout`")],
    out: Annotated[Path, typer.Option(help="JSONL file to write")] = Path("scored.jsonl"),
    reads: Annotated[str, typer.Option(help="summary or response")] = "response",
) -> None:
    """Score completions with a reward model in vLLM."""
    from typing import get_args

    from r1kern.data.reading import Reads
    from r1kern.scoring import score_file

    if reads not in get_args(Reads):
        raise UserError(f"unknown --reads '{reads}': choose one of {', '.join(get_args(Reads))}")
    print(f"{score_file(model, rollouts, out=out, reads=reads)}\nscored: {out}")
