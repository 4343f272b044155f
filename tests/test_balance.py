"""The experts' bias update and balance loss are the paper's, whatever the layout.

The truth is transformers' model in float64 (but for its routers, which compute in float32) with the
sequence-level loss of arXiv 2412.19437, equations 17-20, added by hooks on them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from launch import TESTS, torchrun
from tiny_model import write_tiny_model
from transformers import DeepseekV3ForCausalLM

from r1kern.types import Sequence

BIAS_RATE, BALANCE = 0.05, 0.5  # as in workers/balance.py
LAYOUTS = ["1,1,1,2000,-", "1,1,1,60,-", "2,1,1,100,-", "1,2,1,60,-", "2,2,1,60,-", "1,1,2,60,-"]


class Truth:
    """One update's loss, gradient norm, balance loss and expert counts, one sequence at a time."""

    def __init__(self, folder, sequences: list[Sequence]):
        self.model = DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        self.routed: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for i, layer in enumerate(self.model.model.layers):
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(
                    lambda gate, _, output, i=i: self.routed.append((i, output[0], output[2]))
                )
        self.counts, nll, self.balance = {}, 0.0, 0.0
        tokens = sum(len(s.completion_ids) for s in sequences)
        for s in sequences:
            ids = torch.tensor(s.prompt_ids + s.completion_ids)
            self.routed.clear()
            logits = self.model(ids[None, :-1]).logits[0, len(s.prompt_ids) - 1 :]
            targets = torch.tensor(s.completion_ids)
            nll = nll + F.cross_entropy(logits, targets, reduction="sum") / tokens
            for i, router_logits, chosen in self.routed:
                count = torch.bincount(chosen.flatten(), minlength=16)
                self.counts[i] = self.counts.get(i, 0) + count
                self.balance = self.balance + balance_loss(router_logits) / len(sequences)
        self.loss = nll.item()
        plain = torch.autograd.grad(nll, list(self.model.parameters()), retain_graph=True)
        whole = torch.autograd.grad(nll + self.balance, list(self.model.parameters()))
        self.plain_norm, self.norm = (
            torch.stack([g.norm() for g in grads]).norm().item() for grads in (plain, whole)
        )


def balance_loss(logits: torch.Tensor, topk: int = 4) -> torch.Tensor:
    """Equations 17-20 of one sequence, logits [T, E]."""
    scores = logits.double().sigmoid()
    length, experts = scores.shape
    greatest = torch.zeros_like(scores).scatter(1, scores.topk(topk).indices, 1.0)
    f = experts / (topk * length) * greatest.sum(0)
    p = (scores / scores.sum(1, keepdim=True)).mean(0)
    return BALANCE * (f * p).sum()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("balance")
    write_tiny_model(folder / "model", seed=1, num_hidden_layers=4)
    generator = torch.Generator().manual_seed(2)

    def ids(count):
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    sequences = [Sequence(ids(2 + i % 5), ids(1 + 3 * i)) for i in range(13)]
    tokens = sum(len(s.completion_ids) for s in sequences)
    truth = {"sequences": sequences, "tokens": tokens, "mtp_coef": 0.0}
    torch.save(truth, folder / "truth.pt")
    worker = TESTS / "workers" / "balance.py"
    torchrun(2, worker, folder / "model", folder / "truth.pt", folder, *LAYOUTS)
    found = {name: torch.load(folder / f"{name.replace(',', '_')}.pt") for name in LAYOUTS}
    return Truth(folder / "model", sequences), found


def test_bias_moves_by_the_counts_of_the_whole_batch(case):
    truth, found = case
    for i, counts in truth.counts.items():
        name = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
        before = truth.model.state_dict()[name]
        step = torch.sign(counts.double().mean() - counts)
        assert step.abs().sum() > 8  # an unbalanced start
        for layout, result in found.items():
            assert (result["biases"][0][name] - before - BIAS_RATE * step).abs().max() < 1e-6, (
                layout,
                i,
            )
            # Counted from 0 again: the second update moves by one step at most.
            second = (result["biases"][1][name] - result["biases"][0][name]).abs()
            assert second.max() < 1.001 * BIAS_RATE, layout
            assert result["biases"][1][name].equal(found[LAYOUTS[0]]["biases"][1][name]), layout


def test_the_greatest_load_is_told(case):
    truth, found = case
    load = max((c.max() / c.double().mean()).item() for c in truth.counts.values())
    for layout, result in found.items():
        assert result["updates"][0]["expert_load"] == pytest.approx(load, rel=1e-6), layout


def test_balance_loss_and_its_gradient_are_the_papers(case):
    truth, found = case
    assert truth.norm != pytest.approx(truth.plain_norm, rel=1e-3)  # it has a say in the gradient
    for layout, result in found.items():
        first = result["updates"][0]
        assert first["balance_loss"] == pytest.approx(truth.balance.item(), rel=1e-6), layout
        assert first["loss"] == pytest.approx(truth.loss, rel=1e-6), layout
        assert first["grad_norm"] == pytest.approx(truth.norm, rel=3e-6), layout


def test_updates_do_not_depend_on_the_layout(case):
    one = case[1][LAYOUTS[0]]
    for layout, result in case[1].items():
        for name in ("loss", "balance_loss", "grad_norm", "expert_load"):
            assert result["updates"][1][name] == pytest.approx(one["updates"][1][name], rel=3e-6), (
                layout,
                name,
            )
        for name, weight in one["weights"].items():
            error = (result["weights"][name] - weight).norm() / (weight.norm() + 1e-9)
            assert error < 1e-5, (layout, name)
