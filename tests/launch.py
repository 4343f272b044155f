"""Runs worker scripts and commands of the tests: gloo ranks, or one process, of this machine.

`torchrun` and `python` start real processes, but fork them from one that has imported torch,
Megatron-core and vLLM (`forked.py`).  `command` is the genuine torchrun, for tests of what it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from multiprocessing.connection import wait
from pathlib import Path

from forked import Forked
from torch.distributed import TCPStore

from r1kern import nccl

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def command(processes: int, *arguments: str, restarts: int = 0) -> list[str]:
    """`torchrun` as a list of words; a module or script with its arguments follows."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return [*launcher, *options, *map(str, arguments)]


def environment(*, compiled: bool = False) -> dict[str, str]:
    """Of the tests' processes.

    Args:
        compiled: vLLM's sampler has a small function compiled, as users' runs do: some seconds of
            a C++ compiler in each process.
    """
    # A run within this process may have set where its collectives are recorded.
    own = {name: value for name, value in os.environ.items() if name != nccl.DUMP}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}
    return own if compiled else own | {"TORCHDYNAMO_DISABLE": "1"}


def genuine_torchrun(
    processes: int,
    *arguments: str,
    restarts: int = 0,
    timeout_s: float = 600,
    compiled: bool = False,
) -> None:
    """A failing worker fails the test with its output."""
    done = subprocess.run(
        command(processes, *arguments, restarts=restarts),
        env=environment(compiled=compiled),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def torchrun(processes: int, *arguments: str, restarts: int = 0, timeout_s: float = 600) -> None:
    """Ranks as torchrun starts them, all again when one fails; the last failure fails the test."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": str(restarts),
        "TORCHELASTIC_RUN_ID": str(uuid.uuid4()),
    }
    end = time.monotonic() + timeout_s
    for attempt in range(restarts + 1):
        job["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        places = ({"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes))
        ranks = [Forked([*map(str, arguments)], job | place) for place in places]
        await_all(ranks, end - time.monotonic())
        codes = [rank.poll() for rank in ranks]
        if not any(codes):
            return
    texts = ("\n".join(rank.output())[-6000:] for rank in ranks)
    told = "\n".join(
        f"-- rank {r}: {code}\n{text}"
        for r, (code, text) in enumerate(zip(codes, texts, strict=True))
    )
    raise AssertionError(told)


def await_all(ranks: list[Forked], timeout_s: float) -> None:
    """Until all have ended; a failure, or the end of the time, is the end of all."""
    end = time.monotonic() + timeout_s
    left = {rank.sentinel: rank for rank in ranks}
    try:
        while left:
            ended = wait(left, max(0.0, end - time.monotonic()))
            if not ended or any(left.pop(sentinel).wait() for sentinel in ended):
                return
    finally:
        for rank in ranks:
            rank.kill()


def python(
    *arguments: str, cwd: Path | None = None, timeout_s: float = 600, **variables: str
) -> subprocess.CompletedProcess:
    """`python ARGUMENTS`, of which the first is `-m`, `-c` or a script, to its end."""
    words = [*map(str, arguments)]
    process = Forked(words, environment() | variables, cwd)
    await_all([process], timeout_s)
    return subprocess.CompletedProcess(words, process.poll(), *process.output())
