"""Registration of the custom ops, fake tensors, and arguments that do not fit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from truth import BF16, F32, V3, head_inputs, route_inputs

from r1kern import ops
from r1kern.kernels import permute
from r1kern.kernels import route as router
from r1kern.kernels.advantage import group_advantage
from r1kern.kernels.linear_grpo_loss import loss_and_gradients
from r1kern.kernels.linear_logprob import linear_logprob, linear_logprob_backward
from r1kern.kernels.objective import grpo_loss


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(dtype):
    hidden, weight, targets = head_inputs(T=6, dtype=dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    opcheck(linear_logprob, (*leaves, targets, 0.7, None))
    outputs = linear_logprob(*leaves, targets, 0.7, None)
    assert [x.requires_grad for x in outputs] == [True, True, False, False, False]
    opcheck(linear_logprob, (hidden.t().contiguous().t(), weight, targets, 0.7, None))
    wide = torch.promote_types(dtype, F32)
    rows = torch.rand(6, dtype=wide)
    for g, h in ((rows, None), (None, rows), (rows, rows)):
        arguments = (hidden.detach(), weight.detach(), targets, rows, rows, rows + 9, g, h, 0.7)
        opcheck(linear_logprob_backward, arguments)
    values = [x.detach() for x in leaves]
    for with_gradients in (True, False):
        scalars = (0.7, 0.2, 0.2, 0.1, "k3", 0.1, 2.0, None, with_gradients)
        opcheck(loss_and_gradients, (*values, targets, rows, rows, rows, rows, rows, *scalars))
    scalars = (0.7, 0.2, 0.2, 0.0, "k3", 0.0, None, None, True)
    opcheck(loss_and_gradients, (*values, targets, None, None, None, rows, rows, *scalars))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck_of_routing(dtype):
    wide = torch.promote_types(dtype, F32)
    logits, bias = route_inputs(6, 8, dtype)
    opcheck(router.route, (logits.requires_grad_(), bias, 2, 1, 2, 1.5, True, 4))
    logits, indices = logits.detach(), torch.tensor([[0, 3]] * 6)
    w, s = torch.rand(6, 2, dtype=wide), torch.rand(8, dtype=wide)
    for gradients in ((w, None), (None, s), (w, s)):
        opcheck(router.route_backward, (logits, indices, *gradients, 1.5, True))
    slots = torch.randperm(12, dtype=torch.int32).view(6, 2)
    x, rows = torch.rand(6, 5).to(dtype), torch.rand(14, 5).to(dtype)
    order = torch.full((14,), -1, dtype=torch.int32)
    order[slots.flatten().long()] = torch.arange(12, dtype=torch.int32)
    opcheck(permute.permute, (x.requires_grad_(), slots, order))
    opcheck(permute.unpermute, (rows.requires_grad_(), slots, order, None))
    opcheck(permute.unpermute, (rows, slots, order, w.clone().requires_grad_()))
    opcheck(permute.unpermute_backward, (x.detach(), rows.detach(), slots, w))


def test_opcheck_of_losses():
    opcheck(group_advantage, (torch.rand(5), torch.tensor([0, 0, 1, 1, 1]), "population", 1e-6))
    a, live = torch.rand(3, 4), torch.rand(3, 4) < 0.7
    tail = ("token", 0.2, 0.2, 0.1, "k3")
    opcheck(grpo_loss, (a.clone().requires_grad_(), a, a, a[:, 0], live, a, a, *tail))
    opcheck(grpo_loss, (a.clone().requires_grad_(), a, None, a[:, 0], live, a, None, *tail))


def test_ops_run_on_fake_tensors_of_the_671b_model():
    with FakeTensorMode():
        hidden = torch.empty(8192, 7168, dtype=BF16, requires_grad=True)
        weight = torch.empty(129_280, 7168, dtype=BF16, requires_grad=True)
        logp, entropy = ops.linear_logprob(hidden, weight, torch.empty(8192, dtype=torch.int64))
        assert logp.shape == entropy.shape == (8192,) and logp.dtype == F32
        advantages = ops.group_advantage(torch.empty(8), torch.empty(8, dtype=torch.int64))
        rows = logp.view(8, 1024)
        loss, _ = ops.grpo_loss(rows, rows, rows, advantages, torch.ones(8, 1024))
        ids = torch.empty(8192, dtype=torch.int64)
        fused, _ = ops.linear_grpo_loss(
            hidden, weight, ids, logp.detach(), logp.detach(), advantages, mask=None
        )
        (loss + fused + entropy.sum()).backward()
        assert hidden.grad.dtype == weight.grad.dtype == BF16
        logits = torch.empty(8192, 256, requires_grad=True)
        routing = ops.route(logits, torch.empty(256), **V3)
        assert routing.indices.shape == routing.weights.shape == (8192, 8)
        assert routing.counts.shape == (256,)
        rows = ops.permute(hidden, routing)
        assert rows.shape == (65_536, 7168)
        assert ops.unpermute(rows, routing, routing.weights).shape == hidden.shape
        routing.weights.sum().backward()
        assert logits.grad.shape == logits.shape


LAYOUT = {"num_groups": 1, "topk_groups": 1, "topk": 2}
x, ids, h, w = torch.rand(3, 4), torch.tensor([0, 1, 2]), torch.rand(3, 4), torch.rand(5, 4)
REFUSALS = {
    "advantage std": (lambda: ops.group_advantage(x[:, 0], ids, std="var"), "std must be one of"),
    "advantage shape": (
        lambda: ops.group_advantage(x, ids),
        r"rewards must be a float tensor \[N\]",
    ),
    "advantage ints": (lambda: ops.group_advantage(ids, ids), "rewards must be a float tensor"),
    "group ids": (
        lambda: ops.group_advantage(x[:, 0], x[:, 0]),
        r"group_ids must be integers \[3\]",
    ),
    "group length": (
        lambda: ops.group_advantage(x[:, 0], ids[:2]),
        r"group_ids must be integers \[3\]",
    ),
    "normalizer": (
        lambda: ops.grpo_loss(x, x, x, x[:, 0], x, normalizer="mean"),
        "normalizer must be one of sequence, token, constant, got 'mean'",
    ),
    "ratio": (lambda: ops.grpo_loss(x, x, x, x[:, 0], x, ratio="product"), "ratio must be one of"),
    "logp": (lambda: ops.grpo_loss(ids, x, x, x[:, 0], x), r"logp must be a float tensor \[B, S\]"),
    "old": (lambda: ops.grpo_loss(x, x[:, :2], x, x[:, 0], x), r"old_logp must be \[3, 4\]"),
    "mask": (lambda: ops.grpo_loss(x, x, x, x[:, 0], x[:2]), r"mask must be \[3, 4\]"),
    "advantages": (lambda: ops.grpo_loss(x, x, x, x[0], x), r"advantages must be \[3\]"),
    "loss device": (
        lambda: ops.grpo_loss(x, x, x.to("meta"), x[:, 0], x),
        "one device, got .*'ref_logp': 'meta'",
    ),
    "max_tokens": (
        lambda: ops.grpo_loss(x, x, x, x[:, 0], x, normalizer="constant"),
        "needs max_tokens",
    ),
    "clip": (
        lambda: ops.grpo_loss(x, x, x, x[:, 0], x, clip_low=1.5),
        r"clip_low must be in \[0, 1\]",
    ),
    "hidden": (lambda: ops.linear_logprob(h[0], w, ids), "hidden must be a float tensor"),
    "weight shape": (lambda: ops.linear_logprob(h, w[:, :3], ids), r"weight must be .*\[V, 4\]"),
    "weight dtype": (
        lambda: ops.linear_logprob(h, w.double(), ids),
        "weight must be torch.float32",
    ),
    "targets dtype": (
        lambda: ops.linear_logprob(h, w, ids.int()),
        r"targets must be torch.int64 \[3\]",
    ),
    "targets shape": (
        lambda: ops.linear_logprob(h, w, ids[:2]),
        r"targets must be torch.int64 \[3\]",
    ),
    "targets high": (lambda: ops.linear_logprob(h, w, ids + 3), r"in \[0, 5\), found 3 to 5"),
    "targets low": (lambda: ops.linear_logprob(h, w, ids - 100), r"in \[0, 5\), found -100 to -98"),
    "device": (lambda: ops.linear_logprob(h, w.to("meta"), ids), "tensors must be on one device"),
    "temperature": (
        lambda: ops.linear_logprob(h, w, ids, temperature=0.0),
        "temperature must be above",
    ),
    "kl": (
        lambda: ops.linear_grpo_loss(h, w, ids, None, h[:, 0], h[:, 0], ids, kl="k1"),
        "kl must be one of k3, k3_unbiased, k2, got 'k1'",
    ),
    "no reference": (
        lambda: ops.linear_grpo_loss(h, w, ids, None, None, h[:, 0], ids),
        "ref_logp is missing",
    ),
    "cap": (
        lambda: ops.linear_grpo_loss(
            h, w, ids, None, None, h[:, 0], ids, beta=0.0, importance_cap=2.0
        ),
        "importance_cap needs sampled_logp",
    ),
    "rows": (
        lambda: ops.linear_grpo_loss(h, w, ids, h[:2, 0], None, h[:, 0], ids, beta=0.0),
        r"old_logp must be \[3\]",
    ),
    "grid of rows": (
        lambda: ops.linear_grpo_loss(h, w, ids, None, None, h[:2, 0], beta=0.0),
        "3 rows are no grid of 2 sequences",
    ),
    "row advantages": (
        lambda: ops.linear_gspo_loss(h, w, ids, None, None, ids, ids, beta=0.0),
        r"advantages must be a float tensor \[B\]",
    ),
    "sequence ids": (
        lambda: ops.linear_grpo_loss(h, w, ids, None, None, h[:, 0], ids[:2], beta=0.0),
        r"sequence_ids must be integers \[3\]",
    ),
    "align": (lambda: ops.route(x, x[0], **LAYOUT, align=0), "align must be 1 or more, got 0"),
    "permute": (
        lambda: ops.permute(x[:2], ops.route(x, x[0], **LAYOUT)),
        r"x must be \[3, H\], got torch.float32 \[2, 4\]",
    ),
    "unpermute": (
        lambda: ops.unpermute(x, ops.route(x, x[0], **LAYOUT)),
        r"rows must be float \[6, H\]",
    ),
    "unpermute weights": (
        lambda: ops.unpermute(torch.rand(6, 2), ops.route(x, x[0], **LAYOUT), x),
        r"weights must be \[3, 2\]",
    ),
    "no vocabulary": (lambda: ops.linear_logprob(h, w[:0], ids), "weight has no rows"),
    "logits": (
        lambda: ops.route(x[0], x[0], num_groups=1, topk_groups=1, topk=1),
        "logits must be",
    ),
    "bias": (
        lambda: ops.route(x, x[:, 0], num_groups=1, topk_groups=1, topk=1),
        r"bias must be \[4\]",
    ),
    "groups": (
        lambda: ops.route(x, x[0], num_groups=3, topk_groups=1, topk=1),
        "num_groups must divide the 4 experts, got 3",
    ),
    "topk_groups": (
        lambda: ops.route(x, x[0], num_groups=2, topk_groups=3, topk=1),
        r"topk_groups must be in 1..2 \(num_groups\), got 3",
    ),
    "group size": (
        lambda: ops.route(x, x[0], num_groups=4, topk_groups=1, topk=1),
        "at least 2 of 4 experts a group",
    ),
    "topk": (
        lambda: ops.route(x, x[0], num_groups=2, topk_groups=1, topk=3),
        "topk must be in 1..2",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
