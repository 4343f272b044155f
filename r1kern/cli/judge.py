"""`r1kern judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1kern.cli.application import Overrides, app


@app.command()
def judge(
    answers: Annotated[Path, typer.Argument(help="the model's answers, JSONL (r1kern rollout)")],
    baseline: Annotated[Path, typer.Argument(help="the baseline's answers to these questions")],
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="YAML file with the judge")] = Path(
        "configs/judge.yaml"
    ),
    out: Annotated[
        Path, typer.Option(help="JSONL file that keeps each judgement; a rerun goes on from it")
    ] = Path("judgements.jsonl"),
    json: Annotated[Path | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Compare two models' final summaries by a judge model: win rates, length-controlled too."""
    from dataclasses import asdict
    from json import dumps

    from r1kern.config import JudgeConfig, load_config
    from r1kern.eval.judged import judge_answers

    options = load_config(JudgeConfig, config, overrides or [])
    judged = judge_answers(options, answers, baseline, out)
    print(f"{judged.lines()}\njudgements: {out}")
    if json:
        json.write_text(dumps(asdict(judged), indent=1) + "\n")
