"""The command that writes a run's page: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1kern.cli.application import app


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="of a run, a pipeline or an evaluation")],
    out: Annotated[Path | None, typer.Option(help="file; default FOLDER/report.html")] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="show it in a browser")] = False,
) -> None:
    """Write one self-contained page: charts over training, completions, lineage of stages."""
    from r1kern.report.html import make_report

    path = make_report(folder, out)
    print(f"report: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    if show:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
