"""The parts of a GRPO step: advantages, denominators, the loss on a packed batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from r1kern import distributed, ops
from r1kern.config import GRPO as Options
from r1kern.types import Completion, Prompt, Rollout, Score, Sequence


@pytest.fixture(scope="module", autouse=True)
def world():
    """Megatron on CPU must be in place before the trainer's modules are imported."""
    yield distributed.start(seed=0)
    distributed.shutdown()


def group(totals, *, failures=(), lengths=None, finish="stop") -> Rollout:
    lengths = lengths or [3] * len(totals)
    return Rollout(
        prompt=Prompt(id="p", ids=(4, 5), answer="1", text="?"),
        completions=tuple(
            Completion(tuple(range(10, 10 + n)), (-0.5,) * n, "x", finish) for n in lengths
        ),
        weight_version=0,
        scores=tuple(
            Score({"accuracy": t}, t, "crashed" if i in failures else None)
            for i, t in enumerate(totals)
        ),
    )


def test_advantages_are_standardised_within_each_group():
    from r1kern.train.objective import to_sequences

    found = to_sequences([group([1, 0, 0, 1]), group([2, 2, 2])], Options())
    assert [round(s.advantage, 4) for s in found] == [1, -1, -1, 1, 0, 0, 0]
    assert found[0].sampled_logps == (-0.5, -0.5, -0.5)


def test_a_failed_grader_is_left_out_of_the_group_and_of_the_mean():
    from r1kern.train.objective import to_sequences
    from r1kern.train.step_metrics import rollout_metrics

    rollouts = [group([1, 0, 0], failures=[2])]
    assert [round(s.advantage, 4) for s in to_sequences(rollouts, Options())] == [1, -1]
    metrics = rollout_metrics(rollouts)
    assert metrics["reward"] == 0.5
    assert metrics["grader_failures"] == 1


def test_truncated_completions_can_be_left_out():
    from r1kern.train.objective import to_sequences

    rollouts = [group([1, 0], finish="length")]
    assert to_sequences(rollouts, Options(drop_truncated=True)) == []
    assert len(to_sequences(rollouts, Options())) == 2


def head_of(targets, logps_of, V=64):
    """Hidden states that are the logits themselves, with the log-probs asked for."""
    from r1kern.train.head import Head

    p = torch.tensor([logps_of[t] for t in targets.tolist()]).exp()[:, None]
    logits = ((1 - p) / (V - 1)).log().expand(-1, V).scatter(1, targets[:, None], p.log())
    return Head(logits.requires_grad_(), torch.eye(V), targets, {"temperature": 1.0})


def packed_loss(options, sequences, micro_batches, logps_of):
    """The step's loss over `micro_batches` cuts, and its gradient by token's log-prob."""
    from r1kern.train.objective import counts, grpo_step_loss
    from r1kern.train.packing import pack

    total, metrics, gradients = 0.0, {}, {}
    for rank in range(micro_batches):
        for batch in pack(sequences, budget=512, dp=micro_batches, dp_rank=rank):
            head = head_of(batch.targets, logps_of)
            loss, part = grpo_step_loss(
                head,
                batch,
                options=options,
                denominators=counts(sequences),
                trained_tokens=counts(sequences)["num_tokens"],
                max_tokens=20,
            )
            loss.backward()
            total += loss.item()
            # d logp_t / d logit_t = 1 - p_t
            for t, row in zip(batch.targets.tolist(), head.hidden.grad, strict=True):
                gradients[t] = row[t].item() / (1 - math.exp(logps_of[t]))
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
    return total, metrics, gradients


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("normalizer", ["sequence", "token", "constant"])
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(normalizer, ratio):
    options = Options(beta=0.0, normalizer=normalizer, importance_cap=2.0, ratio=ratio)
    generator = np.random.default_rng(0)
    sequences, first = [], 10
    for n in (5, 1, 9, 3, 7):
        ids = tuple(range(first, first + n))
        sequences.append(Sequence((1, 2), ids, float(generator.normal()), (-1.0,) * n))
        first += n
    logps_of = {t: float(generator.uniform(-3, 0)) for t in range(10, first)}
    whole = packed_loss(options, sequences, 1, logps_of)
    for cuts in (2, 3, 8):
        loss, metrics, gradients = packed_loss(options, sequences, cuts, logps_of)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        for name in ("mismatch", "entropy", "ratio", "clip_fraction"):
            assert metrics[name] == pytest.approx(whole[1][name], rel=1e-5)
        assert gradients == pytest.approx(whole[2], rel=1e-4)


def test_the_first_update_is_plain_policy_gradient():
    """With old = present policy the ratio is 1: d loss / d logp = -A / (|o_i| * sequences)."""
    sequences = [Sequence((1,), (10, 11), 1.5, (-1.0, -1.0)), Sequence((1,), (12,), -2.0, (-1.0,))]
    loss, metrics, gradients = packed_loss(
        Options(beta=0.0), sequences, 1, {10: -1.0, 11: -0.2, 12: -3.0}
    )
    assert gradients == pytest.approx({10: -0.375, 11: -0.375, 12: 1.0}, rel=1e-5)
    assert loss == pytest.approx(-(1.5 - 2.0) / 2)
    assert metrics["max_mismatch"] == pytest.approx(2.0)
    assert metrics["mismatch"] == pytest.approx((0 + 0.8 + 2.0) / 3)


def test_advantages_match_the_public_op():
    rewards = torch.tensor([1.0, 0.0, 0.5, 3.0, 1.0])
    ids = torch.tensor([0, 0, 0, 1, 1])
    from r1kern.train.objective import to_sequences

    found = to_sequences([group([1, 0, 0.5]), group([3, 1])], Options())
    expected = ops.group_advantage(rewards, ids)
    assert torch.allclose(torch.tensor([s.advantage for s in found]), expected)
