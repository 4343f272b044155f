"""Jobs that cannot go on end by themselves and say why."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from launch import TESTS, environment

WORKER = TESTS / "workers" / "watch.py"


def ranks(*arguments: str, size: int = 2) -> list[tuple[int | None, str]]:
    """Exit code and output of each rank, with no torchrun that would end the others.

    A rank that is still there 20 s after all others have ended has no exit code.
    """
    port = str(20000 + os.getpid() % 20000)
    base = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, *arguments],
            env=base | {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    end = time.monotonic() + 120
    while sum(p.poll() is None for p in processes) > 1 and time.monotonic() < end:
        time.sleep(0.2)
    try:
        processes[0].wait(2)
        processes[-1].wait(2)
    except subprocess.TimeoutExpired:
        pass
    codes = [p.poll() for p in processes]
    for process in processes:
        process.kill()
    return [(code, p.communicate()[0]) for code, p in zip(codes, processes, strict=True)]


def test_ranks_with_different_options():
    for code, output in ranks("differ"):
        assert code == 2, output
        assert "the options of rank 1 and of rank 0 differ" in output
        assert "optim.lr is 2e-06 on rank 1 and 1e-06 on rank 0" in output


def test_a_silent_rank_is_named_by_the_others():
    (code, output), (stopped, _) = ranks("stop", "1")
    assert stopped is None
    assert code == 75, output
    assert "rank 0 in phase 'update, at layer 7': rank 1 has given no sign of life" in output
    assert "it was in phase 'update, at layer 7'" in output
    assert "watch.py" in output  # stacks


@pytest.mark.full
def test_a_silent_rank_0_is_named_by_the_others():
    (stopped, _), (code, output) = ranks("stop", "0")
    assert stopped is None
    assert code == 75, output
    assert "the store, or the machine it is on, gave no answer" in output  # rank 0 holds it


@pytest.mark.full
def test_every_rank_says_where_it_waited():
    for rank, (code, output) in enumerate(ranks("late")):
        assert code == 75, output
        assert f"rank {rank} in phase 'update" in output
        assert "deadline" in output or "no sign of life" in output or "the store" in output
