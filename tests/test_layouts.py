"""The model is transformers' DeepSeek-V3, and trains alike, under every parallel layout.

Guards Megatron-core 0.16.1's silent faults under tensor parallelism: the rotary key's gradient lost
behind column-sharded down projections, experts whose replicas never sum their gradients, and the
same experts missing from the gradient norm.
"""

from __future__ import annotations

import pytest
import torch
from launch import TESTS, torchrun
from safetensors.torch import load_file
from tiny_model import write_tiny_model
from transformers import DeepseekV3ForCausalLM

from r1kern.types import Sequence

WORKER = TESTS / "workers" / "layouts.py"

# Kind of rope -> processes -> TP,EP,PP,token budget of a micro-batch
LAYOUTS = {
    "plain": {
        1: ["1,1,1,2000", "1,1,1,60"],
        2: ["1,1,1,60", "2,1,1,100", "1,2,1,60", "1,1,2,60", "2,2,1,60"],
        4: ["2,2,1,60", "2,2,2,100"],
    },
    "yarn": {1: ["1,1,1,2000"], 2: ["2,1,1,100", "1,2,1,60", "1,1,2,60"]},
    "uneven": {1: ["1,1,1,2000"], 4: ["1,1,4,60"]},  # 5 layers on 4 stages
}


@pytest.fixture(
    scope="module", params=["plain", "yarn", pytest.param("uneven", marks=pytest.mark.full)]
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def truth(kind, tmp_path_factory):
    """A random model, transformers' logits of it, and a ragged batch to train on."""
    folder = tmp_path_factory.mktemp(kind)
    layers = 5 if kind == "uneven" else 4
    config = write_tiny_model(
        folder / "model", seed=1, yarn=kind == "yarn", num_hidden_layers=layers
    )
    model = DeepseekV3ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(2)

    def ids(count):
        return torch.randint(3, config.vocab_size, (count,), generator=generator)

    documents = [ids(n) for n in (7, 33, 20, 4)]
    dense = torch.stack([ids(96), ids(96)])
    sequences = [
        Sequence(tuple(ids(2 + i % 5).tolist()), tuple(ids(1 + 3 * i).tolist())) for i in range(13)
    ]
    with torch.no_grad():
        logits = model(dense).logits.transpose(0, 1).flatten(0, 1)
        packed = torch.cat([model(d[None]).logits[0] for d in documents])
    torch.save(
        {
            "ids": dense,
            "documents": documents,
            "dense": logits,
            "packed": packed,
            "weights": load_file(folder / "model" / "model.safetensors"),
            "sequences": sequences,
            "tokens": sum(len(s.completion_ids) for s in sequences),
        },
        folder / "truth.pt",
    )
    return folder


@pytest.fixture(scope="module")
def results(kind, truth):
    """Every layout's result."""
    torch.serialization.add_safe_globals([Sequence])
    found = {}
    for processes, layouts in LAYOUTS[kind].items():
        out = truth / str(processes)
        out.mkdir()
        torchrun(processes, WORKER, truth / "model", truth / "truth.pt", out, *layouts)
        for layout in layouts:
            name = f"{layout.replace(',', '_')}.pt"
            found[f"{processes} x {layout}"] = torch.load(out / name)
    return found


def test_logits_match_transformers(results):
    for layout, result in results.items():
        assert set(result["parity"]) == {"dense", "packed"}, layout
        assert max(result["parity"].values()) < 1e-5, (layout, result["parity"])


def test_export_gives_back_what_was_imported(results):
    assert {layout: r["export"] for layout, r in results.items()} == dict.fromkeys(results, 0.0)


def test_updates_do_not_depend_on_the_layout(results):
    one = results["1 x 1,1,1,2000"]
    assert one["microbatches"] == 1
    for layout, result in results.items():
        assert result["logps"] == pytest.approx(one["logps"], rel=1e-6), layout
        for mine, theirs in zip(result["updates"], one["updates"], strict=True):
            for name in ("loss", "grad_norm", "entropy", "max_logp"):
                assert mine[name] == pytest.approx(theirs[name], rel=3e-6), (layout, name)
        for name, weight in one["weights"].items():
            error = (result["weights"][name] - weight).norm() / (weight.norm() + 1e-9)
            assert error < 1e-5, (layout, name)


def test_updates_change_every_weight(results, truth):
    before = load_file(truth / "model" / "model.safetensors")
    after = results["1 x 1,1,1,2000"]["weights"]
    same = [n for n in before if torch.equal(before[n], after[n]) and "correction_bias" not in n]
    assert same == []
