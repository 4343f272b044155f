"""`r1kern pipeline`: the stages, then what they measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from r1kern.config import PipelineConfig
from r1kern.report.html import write_report
from r1kern.stages.commands import Commands
from r1kern.stages.pipeline import Pipeline
from r1kern.stages.recipe import deepseek_r1


def run_pipeline(config: PipelineConfig, *, redo: Sequence[str] = ()) -> None:
    """Run or go on with the pipeline in `config.run.folder`; prints each stage's accuracy.

    Raises:
        UserError, Interrupted: as of `Pipeline.run`; the report is written all the same.
    """
    folder = Path(config.run.folder)
    commands = Commands(config.launch.processes, config.launch.command)
    pipeline = Pipeline(folder, deepseek_r1(config), commands=commands)
    try:
        pipeline.run(redo=redo)
    finally:
        if (folder / "pipeline.json").is_file():
            page = write_report(folder)
    Console(soft_wrap=True).print(_table(pipeline.records()))
    print(f"report: {page}")


def _table(records: list[dict]) -> Table:
    table = Table("stage", "time", "what came out", "held-out pass@1")
    for record in records:
        counts = [f"{key} {value:,}" for key, value in record.get("counts", {}).items()]
        dropped = [f"{value:,} {key}" for key, value in record.get("dropped", {}).items()]
        lines = counts + (["dropped: " + ", ".join(dropped)] if dropped else [])
        accuracies = [
            f"{name} {100 * a['pass@1']:.1f} % (+- {100 * a['half_interval']:.1f})"
            for name, a in record.get("accuracy", {}).items()
        ]
        minutes, seconds = divmod(int(record.get("seconds", 0)), 60)
        lines += record.get("notes", [])
        table.add_row(
            record["name"], f"{minutes}:{seconds:02d}", "\n".join(lines), "\n".join(accuracies)
        )
    return table
