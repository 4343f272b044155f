"""Runs a worker script of the tests under torchrun, on gloo ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from r1kern import nccl

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def command(processes: int, *arguments: str, restarts: int = 0) -> list[str]:
    """`torchrun` as a list of words; a module or script with its arguments follows."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return [*launcher, *options, *map(str, arguments)]


def environment() -> dict[str, str]:
    # A run within this process may have set where its collectives are recorded.
    own = {name: value for name, value in os.environ.items() if name != nccl.DUMP}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}


def torchrun(processes: int, *arguments: str, restarts: int = 0, timeout_s: float = 600) -> str:
    """The worker's output; a failing worker fails the test with it."""
    done = subprocess.run(
        command(processes, *arguments, restarts=restarts),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output
