"""r1kern's own commands, each under torchrun, as a stage starts them."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import torch
import yaml

from r1kern.errors import Interrupted, UserError
from r1kern.launch import launch


class Commands:
    """Starts commands and waits for them.

    Args:
        processes: of torchrun on this machine; 0: one a GPU, without GPUs two.
        command: starts torchrun elsewhere, such as "srun torchrun --nnodes 32 ..."; what is to run
            is appended.
    """

    def __init__(self, processes: int = 0, command: str | None = None):
        self._processes = processes or torch.cuda.device_count() or min(2, os.cpu_count())
        self._command = shlex.split(os.path.expandvars(command)) if command else []

    def run(self, name: str, *arguments: str | Path) -> None:
        """`r1kern NAME ARGUMENTS` in all processes.

        Raises:
            UserError: the command failed; what it printed says why.
            Interrupted: it was stopped by a signal.
        """
        words = [name, *map(str, arguments)]
        if self._command:
            code = subprocess.run([*self._command, "-m", "r1kern", *words]).returncode
        else:
            code = launch(words, processes=self._processes)
        if code in (130, 143):
            raise Interrupted(f"stopped in `r1kern {name}`; the same command goes on", code - 128)
        if code:
            raise UserError(f"`r1kern {' '.join(words)}` ended with code {code}: see above")


def write_options(path: Path, options: dict) -> Path:
    """A command's options as the YAML file it reads."""
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return path


def merged(*trees: dict) -> dict:
    """Trees of options laid over one another, the later ones on top."""
    result: dict = {}
    for tree in trees:
        for key, value in tree.items():
            below = result.get(key)
            nested = isinstance(below, dict) and isinstance(value, dict)
            result[key] = merged(below, value) if nested else value
    return result
