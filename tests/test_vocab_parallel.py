"""The LM-head ops over a vocabulary shared by two ranks, ragged shards."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import ensure_running
from launch import environment
from test_head import head_results
from truth import BF16, F32, F64, assert_as_good, head_inputs

from r1kern import ops
from r1kern.kernels import head, reference

SHARDS = (260, 257)
EDGES = (0, 259, 260, 516)
DEADLINE = timedelta(seconds=180)


def assert_grpo(rank, group, hidden, weight, targets):
    """The fused loss: same loss on both ranks, gradients that make up the whole ones."""
    T = len(targets)
    wide = head.accumulator(hidden)
    torch.manual_seed(3)
    old, _ = reference.linear_logprob(hidden.double(), weight.double(), targets)
    old = (old + 0.02 * torch.randn(T, dtype=F64)).to(wide)
    rest = (torch.tensor([1.0, -1.0, 0.0], dtype=wide), torch.arange(T) % 3)
    options = {"beta": 0.0, "clip_low": 0.5, "clip_high": 0.5}
    results = []
    for function, precise in (
        (ops.linear_grpo_loss, False),
        (reference.linear_grpo_loss, False),
        (reference.linear_grpo_loss, True),
    ):
        h, w = (x.double() if precise else x.clone() for x in (hidden, weight))
        if function is ops.linear_grpo_loss:
            w = w.split(SHARDS)[rank].clone()
            options["tp_group"] = group
        h, w = h.requires_grad_(), w.requires_grad_()
        loss, metrics = function(
            h, w, targets, old.to(F64 if precise else wide), None, *rest, **options
        )
        options.pop("tp_group", None)
        dh, dw = torch.autograd.grad(loss, (h, w))
        if function is ops.linear_grpo_loss:
            everyone = torch.empty(2, dtype=loss.dtype)
            dist.all_gather(list(everyone), loss.detach())
            assert everyone[0] == everyone[1]
            dist.all_reduce(dh)
        else:
            dw = dw.split(SHARDS)[rank]
        results.append([loss.detach(), dh, dw, metrics["entropy"]])
    assert_as_good(*results)


def vocab_parallel_rank(rank, rendezvous):
    """One of two ranks: ragged shards, chunks of different sizes, targets at the shards' edges."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=DEADLINE
    )
    try:
        group = dist.new_group([0, 1], timeout=DEADLINE)
        for dtype in (F32, F64, BF16):
            hidden, weight, targets = head_inputs(T=31, V=sum(SHARDS), dtype=dtype)
            targets[: len(EDGES)] = torch.tensor(EDGES)
            weight[SHARDS[0] :, 0] += 8  # of two tokens one shard holds all the probability
            hidden[:2, 0] = torch.tensor([16.0, -16.0])
            head.LOGITS_BYTES["cpu"] = 5 * SHARDS[0] * 8
            shard = weight.split(SHARDS)[rank].clone()
            logp, entropy, partial, shard_grad = head_results(
                ops.linear_logprob, hidden, shard, targets, temperature=0.8, tp_group=group
            )
            everyone = torch.empty(2, 2, len(hidden), dtype=logp.dtype)
            dist.all_gather(list(everyone), torch.stack([logp, entropy]))
            assert torch.equal(everyone[0], everyone[1])
            dist.all_reduce(partial)
            plain = head_results(reference.linear_logprob, hidden, weight, targets, temperature=0.8)
            truth = head_results(
                reference.linear_logprob, hidden.double(), weight.double(), targets, temperature=0.8
            )
            for results in (plain, truth):
                results[3] = results[3].split(SHARDS)[rank]
            assert_as_good([logp, entropy, partial, shard_grad], plain, truth)
            assert_grpo(rank, group, hidden, weight, targets)
        nothing = ops.linear_logprob(hidden[:0], shard, targets[:0], tp_group=group)
        assert nothing[0].shape == nothing[1].shape == (0,)
        with pytest.raises(ValueError, match=r"targets must be in \[0, 517\), found 517 to 517"):
            ops.linear_logprob(hidden[:1], shard, torch.tensor([517]), tp_group=group)
        with pytest.raises(ValueError, match=r"disagree about T: \[5, 6\]"):
            ops.linear_logprob(hidden[: 5 + rank], shard, targets[: 5 + rank], tp_group=group)
        with pytest.raises(
            ValueError, match=r"no rows on a rank of tp_group: shards are \[260, 0\]"
        ):
            ops.linear_logprob(hidden, shard if rank == 0 else shard[:0], targets, tp_group=group)
    finally:
        dist.destroy_process_group()


def test_vocab_parallel_on_two_ranks(tmp_path):
    ensure_running(environment())
    place = (f"file://{tmp_path}/rendezvous",)
    mp.start_processes(vocab_parallel_rank, place, nprocs=2, start_method="forkserver")
