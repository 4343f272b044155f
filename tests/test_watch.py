"""Jobs that cannot go on end by themselves and say why."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from forked import Forked
from launch import ROOT, TESTS, command, environment
from tiny_model import tiny_config

WORKER = TESTS / "workers" / "watch.py"


def ranks(
    *arguments: str, own: list[list[str]] | None = None, grace_s: float = 30.0
) -> list[tuple[int | None, str]]:
    """Exit code and output of each of two ranks, with no torchrun that would end the others.

    Args:
        arguments: of both ranks.
        own: those of each rank, which follow.
        grace_s: a rank that is still there so long after the other has ended has no exit code.
    """
    port = str(20000 + os.getpid() % 20000)
    base = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    base |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        Forked([*map(str, arguments), *(own[rank] if own else [])], base | {"RANK": str(rank)})
        for rank in range(2)
    ]
    for left, seconds in ((1, 120.0), (0, grace_s)):
        end = time.monotonic() + seconds
        while sum(p.poll() is None for p in processes) > left and time.monotonic() < end:
            time.sleep(0.1)
    codes = [p.poll() for p in processes]
    for process in processes:
        process.kill()
    return [(code, "\n".join(p.output())) for code, p in zip(codes, processes, strict=True)]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if "r1kern: error" in line]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Words of a training whose ranks look at the model's configuration before they meet."""
    folder = tmp_path_factory.mktemp("watch")
    tiny_config().save_pretrained(folder / "model")
    overrides = [f"model.path={folder / 'model'}", f"run.folder={folder / 'run'}"]
    return ["-m", "r1kern", "train", ROOT / "configs" / "demo.yaml", *overrides]


def test_ranks_with_different_options(train):
    """Exit code 2 and one line on both, before a model is built."""
    for code, output in ranks(*train, own=[["optim.lr=1e-6"], ["optim.lr=2e-6", "grpo.beta=0.5"]]):
        assert code == 2, output
        (line,) = errors(output)
        assert "the options of rank 1 and of rank 0 differ" in line
        assert "grpo.beta is 0.5 on rank 1 and 0.0 on rank 0" in line
        assert "optim.lr is 2e-06 on rank 1 and 1e-06 on rank 0" in line


@pytest.mark.full
def test_a_killed_rank_ends_the_job_that_torchrun_keeps(tmp_path):
    """SIGKILL, as the kernel does when memory runs out."""
    with subprocess.Popen(
        command(2, WORKER, "kill", tmp_path / "killed at"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        output, _ = job.communicate(timeout=120)
    assert time.time() - float((tmp_path / "killed at").read_text()) < 20
    assert job.returncode != 0
    assert "rank      : 1" in output, output
    assert "Signal 9 (SIGKILL)" in output, output


def test_a_silent_rank_is_named_by_the_others():
    (code, output), (stopped, _) = ranks(WORKER, "stop", "1", grace_s=2)
    assert stopped is None
    assert code == 75, output
    assert "rank 0 in phase 'update, at layer 7': rank 1 has given no sign of life" in output
    assert "it was in phase 'update, at layer 7'" in output
    assert "watch.py" in output  # stacks


@pytest.mark.full
def test_a_silent_rank_0_is_named_by_the_others():
    (stopped, _), (code, output) = ranks(WORKER, "stop", "0", grace_s=2)
    assert stopped is None
    assert code == 75, output
    assert "the store, or the machine it is on, gave no answer" in output  # rank 0 holds it


@pytest.mark.full
def test_every_rank_says_where_it_waited():
    for rank, (code, output) in enumerate(ranks(WORKER, "late")):
        assert code == 75, output
        assert f"rank {rank} in phase 'update" in output
        assert "deadline" in output or "no sign of life" in output or "the store" in output
