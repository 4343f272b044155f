"""One finding of the doctor, and what every check needs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

IMPORT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        ok: True (fit), False (mend it), None (information only).
        found: what is there.
        remedy: the command or change that mends it, "" where nothing is to be mended.
    """

    name: str
    ok: bool | None
    found: str
    remedy: str = ""

    @property
    def state(self) -> str:
        return {True: "ok", False: "problem", None: "note"}[self.ok]


def at_least(name: str, value: int, least_gib: float, remedy: str) -> Check:
    """Bytes against GiB."""
    ok = value >= least_gib * 2**30
    return Check(name, ok, f"{value / 2**30:.1f} GiB", "" if ok else remedy)


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def imports(module: str) -> bool:
    """Whether a module imports, tried in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", f"import {module}"]
    try:
        subprocess.run(
            command, env=environment, capture_output=True, check=True, timeout=IMPORT_TIMEOUT_S
        )
    except subprocess.SubprocessError:
        return False
    return True
