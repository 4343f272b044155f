"""The optimizer in host memory does what the one on the device does, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_dense import write_tiny_dense
from tiny_model import write_tiny_model

from r1kern import distributed
from r1kern.config import Model, Optim, Parallel
from r1kern.types import Sequence

CASES = [
    ("experts", "bfloat16"),
    ("dense", "float32"),
    ("experts", "float32"),
    ("dense", "bfloat16"),
]
FULL = [pytest.param(case, marks=pytest.mark.full) for case in CASES[2:]]


@pytest.fixture(scope="module")
def world():
    yield distributed.start(seed=0)
    distributed.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("offload")
    write_tiny_model(root / "experts", seed=5)
    write_tiny_dense(root / "dense", "qwen2", seed=5, tie_word_embeddings=True)
    return root


@pytest.fixture(params=[*CASES[:2], *FULL], ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def model(case, models):
    return str(models / case[0])


@pytest.fixture
def dtype(case):
    return case[1]


def build(world, model, dtype, *, offload: bool):
    from r1kern.train.policy import Policy

    optim = Optim(lr=1e-3, weight_decay=0.1, schedule="cosine", offload=offload)
    return Policy(Model(path=model, dtype=dtype), Parallel(), optim, world, total_updates=10)


def updates(policy, count: int) -> list[dict[str, float]]:
    from r1kern.train.packing import pack
    from r1kern.train.sft import sft_loss

    sequences = [Sequence((5, 6, 7), (8, 9, 1)), Sequence((5,), (11, 30, 31, 32, 1))]
    batches = pack(sequences, budget=64, dp=1, dp_rank=0)
    return [policy.update(batches, partial(sft_loss, num_tokens=8)) for _ in range(count)]


def states(policy) -> list[torch.Tensor]:
    """Master weights and moments, in one order for either optimizer."""
    found = []
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for param in part.model_param_group_index_map:
            tensors = part._get_main_param_and_optimizer_states(param)
            found += [tensors[name] for name in ("param", "exp_avg", "exp_avg_sq")]
    return found


def assert_same(one, other):
    assert one.lr == other.lr
    for (name, mine), (_, theirs) in zip(one.export(), other.export(), strict=True):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(states(one), states(other), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


def test_updates_are_bit_equal(world, model, dtype):
    host, device = (build(world, model, dtype, offload=offload) for offload in (True, False))
    assert updates(host, 3) == updates(device, 3)
    assert_same(host, device)


def test_states_share_no_memory_with_the_model(world, model, dtype):
    policy = build(world, model, dtype, offload=True)
    updates(policy, 1)
    buffers = policy.ddp.buffers + policy.ddp.expert_parallel_buffers
    on_device = {
        data.untyped_storage().data_ptr()
        for buffer in buffers
        for data in (buffer.param_data, buffer.grad_data)
    }
    held = states(policy)
    assert len(held) == 3 * len(list(policy.model.parameters()))
    assert not on_device & {tensor.untyped_storage().data_ptr() for tensor in held}


@pytest.mark.parametrize(
    ("before", "after"), [(True, True), (True, False), (False, True)], ids=lambda on: f"{on:d}"
)
def test_a_run_goes_on_bit_equal_across_offload(world, model, dtype, tmp_path, before, after):
    from r1kern.train.checkpoint import Checkpoints

    policy, checkpoints = (
        build(world, model, dtype, offload=before),
        Checkpoints(tmp_path, keep_last=1),
    )
    updates(policy, 2)
    checkpoints.save(policy, 2, {})
    other = build(world, model, dtype, offload=after)
    checkpoints.load(other, checkpoints.latest())
    assert_same(other, policy)
    assert updates(other, 2) == updates(policy, 2)
    assert_same(other, policy)
