"""Router replay: the recorded experts, their weights from the present logits."""

from __future__ import annotations

import json

import pytest
import torch
from launch import TESTS, torchrun
from tiny_model import write_tiny_model
from truth import V3, route_inputs

from r1kern import ops
from r1kern.config import TrainConfig, parse_config
from r1kern.errors import UserError

WORKER = TESTS / "workers" / "replay.py"
LAYOUTS = ["1,2,1", "2,1,1", "1,1,2", "1,1,2,recompute"]


def test_replay_on_two_ranks(tmp_path):
    """Bitwise within the worker; expert, tensor and pipeline parallel, recomputed and not."""
    write_tiny_model(tmp_path / "model", seed=3, num_hidden_layers=4)
    torchrun(2, WORKER, tmp_path / "model", tmp_path / "out.json", *LAYOUTS)
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == set(LAYOUTS)
    for layout, result in found.items():
        first, *later = result["rates"]
        assert result["microbatches"] > 1, layout
        assert first == 1.0, layout
        assert all(0.3 < rate < 1.0 for rate in later), (layout, later)
    plain, recomputed = found["1,1,2"], found["1,1,2,recompute"]
    assert recomputed["rates"] == pytest.approx(plain["rates"], abs=1e-3)
    assert recomputed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("T", "E", "options"), [
    (0, 256, V3), (1, 256, V3), (301, 256, V3),
    (77, 16, {"num_groups": 4, "topk_groups": 2, "topk": 4, "scale": 2.5}),
    (40, 9, {"num_groups": 1, "topk_groups": 1, "topk": 3, "normalize": False}),
])  # fmt: skip
def test_rerouting_to_the_same_experts_changes_no_bit(T, E, options, dtype):
    logits, bias = route_inputs(T, E, dtype)
    routing = ops.route(logits, bias, **options)
    how = {k: v for k, v in options.items() if k in ("scale", "normalize")}
    again = ops.reroute(logits, routing, routing.indices, **how)
    assert all(map(torch.equal, routing, again))


def test_rerouted_weights_and_gradients_are_those_of_the_present_logits():
    old, bias = route_inputs(50, 16, torch.float64)
    logits = torch.randn(50, 16, dtype=torch.float64).requires_grad_()
    options = {"num_groups": 4, "topk_groups": 2, "topk": 4}
    given = ops.route(old, bias, **options).indices
    routing = ops.reroute(logits, ops.route(logits, bias, **options), given, scale=2.5)
    plain = logits.sigmoid().gather(1, given)
    plain = 2.5 * plain / plain.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights, plain, rtol=1e-12, atol=0)
    upstream = torch.randn_like(plain)
    mine, theirs = (torch.autograd.grad(w, logits, upstream)[0] for w in (routing.weights, plain))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
    assert torch.equal(routing.indices, given)
    x = torch.randn(50, 8, dtype=torch.float64)
    rows = ops.permute(x, routing)
    expert = torch.arange(16).repeat_interleave(routing.counts)
    assert torch.equal(expert, given.flatten()[routing.order.long()])
    assert torch.equal(rows, x[routing.order.long() // 4])
    assert routing.offsets.tolist() == [0, *routing.counts.cumsum(0).tolist()]


def test_misfits_are_refused_in_one_line():
    logits, bias = route_inputs(5, 256)
    routing = ops.route(logits, bias, **V3)
    with pytest.raises(UserError, match=r"indices must be \[5, 8\]"):
        ops.reroute(logits, routing, routing.indices[:, :4])
    padded = ops.route(logits, bias, align=128, **V3)
    with pytest.raises(UserError, match="align=1"):
        ops.reroute(logits, padded, routing.indices)
    raw = {"model": {"path": "m"}, "data": {"train": "d"}, "experts": {"replay": "generator"}}
    with pytest.raises(UserError, match="use old_policy"):
        parse_config(TrainConfig, raw)
