"""Recomputed activations change neither gradients nor expert counts, and save memory."""

from __future__ import annotations

import pytest
import torch
from launch import TESTS, torchrun
from tiny_model import write_tiny_mtp_model

from r1kern.errors import UserError
from r1kern.model.recompute import recompute_fields
from r1kern.types import Sequence

PARTS = "core_attn+mla_up_proj+mlp+shared_experts"
LAYOUTS = {
    "1,1,1,60": ["-", "full", "moe", PARTS],
    "2,2,1,60": ["-", "full"],
    "1,1,2,60": ["-", "full"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recompute")
    write_tiny_mtp_model(folder / "model", layers=3, depths=1)
    generator = torch.Generator().manual_seed(2)

    def ids(count):
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    sequences = [Sequence(ids(2 + i % 5), ids(1 + 3 * i)) for i in range(11)]
    tokens = sum(len(s.completion_ids) for s in sequences)
    torch.save({"sequences": sequences, "tokens": tokens, "mtp_coef": 0.3}, folder / "truth.pt")
    runs = [f"{layout},{parts}" for layout, all_parts in LAYOUTS.items() for parts in all_parts]
    worker = TESTS / "workers" / "balance.py"
    torchrun(2, worker, folder / "model", folder / "truth.pt", folder, *runs)
    return {run: torch.load(folder / f"{run.replace(',', '_')}.pt") for run in runs}


@pytest.mark.full
def test_updates_are_the_same(found):
    """The forward bit for bit; gradients but for the order in which the embedding's are added."""
    for run, result in found.items():
        plain = found[run.rpartition(",")[0] + ",-"]
        for name in ("loss", "mtp_loss", "balance_loss", "expert_load"):
            assert result["updates"][0][name] == plain["updates"][0][name], (run, name)
        for mine, theirs in zip(result["updates"], plain["updates"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6), run
        for name, weight in plain["weights"].items():
            error = (result["weights"][name] - weight).norm() / (weight.norm() + 1e-9)
            assert error < 1e-6, (run, name)
        assert result["counts"].equal(plain["counts"]), run  # no token counted twice


@pytest.mark.full
def test_less_is_saved_for_the_backward(found):
    saved = {run: result["saved_bytes"] for run, result in found.items()}
    for run, size in saved.items():
        plain = saved[run.rpartition(",")[0] + ",-"]
        assert size < plain or run.endswith("-"), (run, size, plain)
    for layout in LAYOUTS:
        assert saved[f"{layout},full"] < 0.5 * saved[f"{layout},-"], saved


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["full", "moe"], "leave the other parts out"),
        (["moe_act"], "moe_act needs Transformer Engine"),
        (["mlp", "layernorm"], "layernorm needs Transformer Engine"),
    ],
)
def test_parts_that_cannot_work_are_refused(parts, words):
    with pytest.raises(UserError, match=words) as error:
        recompute_fields(parts)
    assert "\n" not in str(error.value)
