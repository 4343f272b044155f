"""Commands on this machine: demo, bench, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1kern.cli.application import app


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option(help="run folder; default: runs/demo, or runs/demo_fp8")
    ] = None,
    seed: int = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget an earlier demo")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="train in blockwise FP8")] = False,
) -> None:
    """Train a tiny DeepSeek-V3 to do sums: cold start, GRPO, held-out pass@1 before and after."""
    from r1kern.demo import run_demo

    folder = folder or Path("runs/demo_fp8" if fp8 else "runs/demo")
    raise typer.Exit(run_demo(folder, seed=seed, fresh=fresh, fp8=fp8))


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
