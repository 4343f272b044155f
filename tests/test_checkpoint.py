"""Checkpoints under real faults: full disk, cut files, wrong folders, hostile pickles."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model

from r1kern import distributed
from r1kern.config import Experts, Model, Optim, Parallel
from r1kern.errors import UserError
from r1kern.types import Sequence


@pytest.fixture(scope="module")
def world():
    yield distributed.start(seed=0)
    distributed.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, seed=5)
    return str(folder)


def build(world, model):
    from r1kern.train.policy import Policy

    return Policy(
        Model(path=model, dtype="float32"),
        Parallel(),
        Optim(lr=1e-3),
        world,
        total_updates=10,
        experts=Experts(bias_update_rate=0.01),
    )


def update(policy) -> dict[str, float]:
    from functools import partial

    from r1kern.train.packing import pack
    from r1kern.train.sft import sft_loss

    batches = pack([Sequence((5, 6, 7), (8, 9, 1))], budget=64, dp=1, dp_rank=0)
    return policy.update(batches, partial(sft_loss, num_tokens=3))


@pytest.fixture
def saved(world, model, tmp_path):
    """A policy after one update, its checkpoint, and where it would go from there."""
    from r1kern.train.checkpoint import Checkpoints

    policy, checkpoints = build(world, model), Checkpoints(tmp_path, keep_last=2)
    update(policy)
    checkpoints.save(policy, 1, {"cursor": 7})
    torch.manual_seed(1)  # a random state that the checkpoint does not have
    return policy, checkpoints


def test_a_restored_policy_goes_on_bit_equal(saved, world, model):
    policy, checkpoints = saved
    drawn = torch.get_rng_state()
    other = build(world, model)
    state = checkpoints.load(other, checkpoints.latest())
    assert state["cursor"] == 7
    assert state["step"] == 1
    assert not torch.equal(torch.get_rng_state(), drawn)
    for _ in range(2):
        assert update(other) == update(policy)
    assert other.lr == policy.lr
    for (name, mine), (_, theirs) in zip(other.export(), policy.export(), strict=True):
        assert torch.equal(mine, theirs), name


def test_only_the_last_ones_are_kept(saved):
    policy, checkpoints = saved
    checkpoints.save(policy, 2, {})
    checkpoints.save(policy, 3, {})
    assert [p.name for p in sorted(checkpoints.folder.iterdir())] == ["step_000002", "step_000003"]


@contextmanager
def full_disk(free_bytes: int):
    """No file may grow over `free_bytes`: writes fail in this process and its children."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("free_bytes", [500, 20_000])
def test_a_full_disk_leaves_the_last_good_checkpoint(saved, world, model, free_bytes):
    policy, checkpoints = saved
    with full_disk(free_bytes), pytest.raises(UserError) as error:
        checkpoints.save(policy, 2, {})
    message = str(error.value)
    assert "free some space" in message
    assert "step_000001" in message
    assert "\n" not in message
    assert checkpoints.latest().name == "step_000001"
    checkpoints.load(build(world, model), checkpoints.latest())
    checkpoints.save(policy, 2, {})  # and with space again it goes on
    assert checkpoints.latest().name == "step_000002"


@pytest.fixture
def background(saved):
    """As `saved`; its checkpoints are written in the background from here on."""
    from r1kern.train.checkpoint import Checkpoints

    policy, checkpoints = saved
    return policy, Checkpoints(checkpoints.folder.parent, keep_last=2, background=True)


def load_model_alone(policy, path: Path) -> None:
    """Without the optimizer, whose master weights would go over the model's own."""
    from megatron.core import dist_checkpointing

    from r1kern.train.checkpoint import _sharded_state

    wanted = {"model": _sharded_state(policy, loading=True)["model"]}
    policy.model.load_state_dict(dist_checkpointing.load(wanted, str(path))["model"], strict=False)


@contextmanager
def held_back(monkeypatch, name: str):
    """While the block lasts, saves wait before their call of the checkpoint module's `name`."""
    from r1kern.train import checkpoint

    function, reached, go_on = getattr(checkpoint, name), threading.Event(), threading.Event()

    def wait(*args):
        reached.set()
        assert go_on.wait(60)
        return function(*args)

    monkeypatch.setattr(checkpoint, name, wait)
    yield reached
    go_on.set()


def test_a_full_disk_in_the_background_shows_at_the_next_call(background, world, model):
    policy, checkpoints = background
    words = r"step_000002 could not.*good checkpoint is .*_000001"
    for next_call in (checkpoints.finish, lambda: checkpoints.save(policy, 3, {})):
        with full_disk(20_000):
            checkpoints.save(policy, 2, {})
            update(policy)  # training goes on beside it
            with pytest.raises(UserError, match=words):
                next_call()
        assert not checkpoints.in_flight
        assert checkpoints.latest().name == "step_000001"
    checkpoints.load(build(world, model), checkpoints.latest())
    checkpoints.save(policy, 3, {})  # and with space again it goes on
    checkpoints.finish()
    assert checkpoints.latest().name == "step_000003"


@pytest.mark.parametrize("moment", ["write_files", "_sync_to_disk"])
def test_a_save_in_the_background_is_of_its_step_and_shows_when_whole(
    background, world, model, monkeypatch, moment
):
    """Weights, expert biases and moments move on while nothing, or all, has been written."""
    policy, checkpoints = background
    asked = {name: tensor.clone() for name, tensor in policy.export()}
    with held_back(monkeypatch, moment) as reached:
        checkpoints.save(policy, 1, {})
        assert reached.wait(60)
        later = [update(policy) for _ in range(2)]
        moved = {name: tensor.clone() for name, tensor in policy.export()}
        for name in ("lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"):
            assert not torch.equal(moved[name], asked[name]), name
        checkpoints.finish(wait=False)
        assert checkpoints.in_flight
        shutil.rmtree(checkpoints.folder / "step_000001")  # of the fixture
        assert checkpoints.latest() is None
    checkpoints.finish()
    other = build(world, model)
    load_model_alone(other, checkpoints.latest())
    for name, tensor in other.export():
        assert torch.equal(tensor, asked[name]), name
    checkpoints.load(other, checkpoints.latest())
    for name, tensor in other.export():
        assert torch.equal(tensor, asked[name]), name
    assert [update(other) for _ in range(2)] == later
    for name, tensor in other.export():
        assert torch.equal(tensor, moved[name]), name


def test_a_checkpoint_folder_removed_in_a_run(background, monkeypatch):
    """Under a save it is an error, between two it is made again."""
    policy, checkpoints = background
    with held_back(monkeypatch, "write_files") as reached:
        checkpoints.save(policy, 2, {})
        assert reached.wait(60)
        shutil.rmtree(checkpoints.folder)
    with pytest.raises(UserError, match=r"step_000002 could not.*No such file.*checkpoint is none"):
        checkpoints.finish()
    checkpoints.save(policy, 3, {})
    checkpoints.finish()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000003"]


def test_a_folder_that_cannot_be_written(saved, tmp_path):
    """Not even by root: no folder can be made in these two."""
    from r1kern.train.checkpoint import Checkpoints

    (tmp_path / "a_file").touch()
    for folder in (tmp_path / "a_file", Path("/proc/self/run")):
        with pytest.raises(UserError) as error:
            Checkpoints(folder, keep_last=2).save(saved[0], 2, {})
        message = str(error.value)
        assert f"{folder}/checkpoints/step_000002 could not be written" in message
        assert "see that the folder can be written" in message
        assert "\n" not in message


def test_a_folder_that_is_no_checkpoint(saved, model, tmp_path):
    policy, checkpoints = saved
    with pytest.raises(UserError, match=r"not an r1kern checkpoint.*step_NNNNNN"):
        checkpoints.load(policy, tmp_path / "nowhere")


def test_a_checkpoint_of_another_model(saved, world, tmp_path):
    _, checkpoints = saved
    write_tiny_model(tmp_path / "other", seed=1, hidden_size=128)
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(build(world, str(tmp_path / "other")), checkpoints.latest())


def test_a_cut_file(saved):
    policy, checkpoints = saved
    for name in (".metadata", "__0_0.distcp", "common.pt", "state.json", "random_0.pt"):
        path = checkpoints.latest() / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="resume from the one before") as error:
            checkpoints.load(policy, checkpoints.latest())
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    checkpoints.load(policy, checkpoints.latest())


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_hostile_pickle_is_not_run(saved, tmp_path):
    policy, checkpoints = saved
    (checkpoints.latest() / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"would run 'posix\.mkdir'"):
        checkpoints.load(policy, checkpoints.latest())
    assert not (tmp_path / "ran").exists()


def test_an_interrupted_save_is_not_the_latest(saved):
    _, checkpoints = saved
    shutil.copytree(checkpoints.latest(), checkpoints.folder / "step_000009.tmp")
    assert checkpoints.latest().name == "step_000001"
