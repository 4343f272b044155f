"""The command line; `r1kern --help` lists the commands, a module here holds some each."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from r1kern.cli import (  # noqa: F401  (they join the application)
    evaluation,
    harness,
    judge,
    machine,
    models,
    recipe,
    report,
    training,
)
from r1kern.cli.application import app
from r1kern.errors import Interrupted, UserError
from r1kern.orphan import end_with_launcher


def main() -> None:
    """Run the command line and leave: threads of vLLM and gloo would hold the process up."""
    end_with_launcher()
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
