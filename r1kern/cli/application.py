"""The application that every command joins, and the arguments that several share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="YAML file with the options, see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint")]
