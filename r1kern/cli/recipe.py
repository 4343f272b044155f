"""Commands that run the recipe: pipeline."""

from __future__ import annotations

from typing import Annotated

import typer

from r1kern.cli.application import Config, Overrides, app


@app.command()
def pipeline(
    config: Config,
    overrides: Overrides = None,
    redo: Annotated[list[str] | None, typer.Option(help="stage to do again, repeatable")] = None,
) -> None:
    """DeepSeek-R1's stages from a base model; the same command goes on after an interruption."""
    from r1kern.config import PipelineConfig, load_config

    options = load_config(PipelineConfig, config, overrides or [])
    from r1kern.stages.run import run_pipeline

    run_pipeline(options, redo=redo or [])
