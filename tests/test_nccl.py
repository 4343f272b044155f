"""What is set for NCCL, and the record of collectives after a hang (gloo's here, the same file)."""

import os
import pickle
import subprocess

import pytest
from launch import TESTS, command, environment

from r1kern import nccl


def test_what_is_set_already_is_kept(monkeypatch, tmp_path):
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_DUMP_ON_TIMEOUT", nccl.DUMP)
    for name in names:
        monkeypatch.setenv(name, "mine")
    nccl.set_environment(tp=8, record_folder=tmp_path)
    assert {os.environ[name] for name in names} == {"mine"}
    for name in names:
        monkeypatch.delenv(name)
    nccl.set_environment(tp=1)
    assert not any(name in os.environ for name in names)
    nccl.set_environment(tp=8, record_folder=tmp_path)
    assert [os.environ[name] for name in names] == ["1", "1", f"{tmp_path}/rank_"]


@pytest.mark.full
def test_a_hang_leaves_the_collectives_of_the_rank_that_waited(tmp_path):
    folder = tmp_path / "collectives"
    done = subprocess.run(
        command(2, TESTS / "workers" / "hang.py", folder),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "the phase that hangs" in done.stderr
    assert "rank 0: last collective: #1 gloo:all_reduce of [[5]]; all: " in done.stderr
    entries = pickle.loads((folder / "rank_0").read_bytes())["entries"]
    reduced = [e["input_sizes"] for e in entries if e["profiling_name"] == "gloo:all_reduce"]
    assert reduced == [[[3]], [[5]]]
