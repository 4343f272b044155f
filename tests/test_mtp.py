"""Multi-token prediction is the paper's, in float32, under every layout; or it is carried along.

The truth is transformers' decoder layers, joined as arXiv 2412.19437 equations 21-25 say.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from launch import TESTS, torchrun
from safetensors.torch import load_file
from tiny_model import write_tiny_model, write_tiny_mtp_model
from transformers import DeepseekV3ForCausalLM

from r1kern.hf.config import read_hf_config
from r1kern.types import Sequence

LAYERS, DEPTHS, COEF = 3, 2, 0.3  # 3 layers on 2 stages: an uneven split
DEEPER = tuple(f"model.layers.{i}." for i in range(LAYERS, LAYERS + DEPTHS))
LAYOUTS = ["1,1,1,2000", "1,1,1,60", "2,1,1,100", "2,2,1,60", "1,1,2,60"]


class Reference:
    """Equations 21-23 with transformers' layers, on one document at a time."""

    def __init__(self, model: DeepseekV3ForCausalLM, tensors: dict[str, torch.Tensor]):
        self.model = model
        names = [n for n in tensors if "eh_proj" in n or "enorm" in n or "hnorm" in n]
        names += [n for n in tensors if "shared_head.norm" in n]
        self.own = {n: tensors[n].clone().requires_grad_() for n in names}

    def norm(self, x, name):
        return F.rms_norm(x, (64,), self.own[name], self.model.config.rms_norm_eps)

    def layer(self, index, x):
        n = x.shape[1]
        places = torch.arange(n)[None]
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        embeddings = self.model.model.rotary_emb(x, position_ids=places)
        return self.model.model.layers[index](
            x, attention_mask=mask, position_ids=places, position_embeddings=embeddings
        )

    def logits(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Of depth 0 (the model), 1, ...: [n - depth, V]; row i predicts token i + depth + 1."""
        inner, head = self.model.model, self.model.lm_head
        h = inner.embed_tokens(ids[None])
        for i in range(LAYERS):
            h = self.layer(i, h)
        h = inner.norm(h)
        found = [head(h)[0]]
        for depth in range(1, min(DEPTHS + 1, len(ids))):
            own = f"model.layers.{LAYERS + depth - 1}."
            e = inner.embed_tokens(ids[None, depth:])
            joined = torch.cat(
                [self.norm(e, f"{own}enorm.weight"), self.norm(h[:, :-1], f"{own}hnorm.weight")], -1
            )
            x = self.layer(LAYERS + depth - 1, joined @ self.own[f"{own}eh_proj.weight"].T)
            h = self.norm(x, f"{own}shared_head.norm.weight")
            found.append(head(h)[0])
        return found

    def losses(self, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over completion tokens of the model's loss, and of the depths' (equation 25)."""
        main, deeper, tokens = 0, 0, sum(len(s.completion_ids) for s in sequences)
        for s in sequences:
            ids = torch.tensor(s.prompt_ids + s.completion_ids)
            for depth, logits in enumerate(self.logits(ids[:-1])):
                first = max(0, len(s.prompt_ids) - 1 - depth)  # its row predicts a completion token
                targets = ids[depth + 1 :][first:]
                nll = F.cross_entropy(logits[first:], targets, reduction="sum") / tokens
                main, deeper = (main + nll, deeper) if depth == 0 else (main, deeper + nll)
        return main, deeper / DEPTHS


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    reference = Reference(
        write_tiny_mtp_model(folder / "model", layers=LAYERS, depths=DEPTHS),
        load_file(folder / "model" / "model.safetensors"),
    )
    generator = torch.Generator().manual_seed(5)

    def ids(count):
        return torch.randint(3, 96, (count,), generator=generator)

    documents = [ids(n) for n in (7, 33, 20, 4)]
    sequences = [
        Sequence(tuple(ids(1 + i % 4).tolist()), tuple(ids(1 + 3 * i).tolist())) for i in range(9)
    ]
    truth = {
        "documents": documents,
        "sequences": sequences,
        "tokens": sum(len(s.completion_ids) for s in sequences),
    }
    torch.save(truth, folder / "truth.pt")
    torchrun(
        2, TESTS / "workers" / "mtp.py", folder / "model", folder / "truth.pt", folder, *LAYOUTS
    )
    found = {name: torch.load(folder / f"{name.replace(',', '_')}.pt") for name in LAYOUTS}
    return folder, reference, truth, found


def test_logits_of_every_depth_are_the_papers(case):
    _, reference, truth, found = case
    with torch.no_grad():
        expected = [reference.logits(document) for document in truth["documents"]]
    for layout, result in found.items():
        start = 0
        for document, depths in zip(truth["documents"], expected, strict=True):
            for depth, logits in enumerate(depths):
                got = result["logits"][depth, start : start + len(logits)]
                assert (got - logits).abs().max() < 1e-5, (layout, depth)
            start += len(document)


def test_import_and_export_are_exact_and_whole(case):
    folder, _, _, found = case
    names = set(load_file(folder / "model" / "model.safetensors"))
    for layout, result in found.items():
        assert result["export"] == [], layout
        assert set(result["exported"]) == names, layout
        sent = {name for name in names if not name.startswith(DEEPER)}
        assert set(result["sent"]) == sent, layout


def test_losses_and_gradients_are_the_papers(case):
    """The gradient reaches the model's layers, its embedding and its head, as in the paper."""
    _, reference, truth, found = case
    main, deeper = reference.losses(truth["sequences"])
    parameters = [*reference.model.parameters(), *reference.own.values()]
    grads = torch.autograd.grad(main + COEF * deeper, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in grads if g is not None]).norm().item()
    for layout, result in found.items():
        first = result["updates"][0]
        assert first["mtp_loss"] == pytest.approx(deeper.item(), rel=2e-6), layout
        assert first["loss"] == pytest.approx((main + COEF * deeper).item(), rel=2e-6), layout
        assert first["grad_norm"] == pytest.approx(norm, rel=5e-6), layout


def test_updates_do_not_depend_on_the_layout(case):
    found = case[3]
    one = found[LAYOUTS[0]]
    for layout, result in found.items():
        for mine, theirs in zip(result["updates"], one["updates"], strict=True):
            for name in ("loss", "mtp_loss", "grad_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=5e-6), (layout, name)
        for name, weight in one["weights"].items():
            error = (result["weights"][name] - weight).norm() / (weight.norm() + 1e-9)
            assert error < 1e-5, (layout, name)


def test_training_moves_every_weight_and_the_copies_follow(case):
    folder, _, _, found = case
    before, after = load_file(folder / "model" / "model.safetensors"), found[LAYOUTS[0]]["weights"]
    same = [n for n in before if before[n].equal(after[n]) and "correction_bias" not in n]
    assert same == []
    for layer in DEEPER:
        assert after[f"{layer}embed_tokens.weight"].equal(after["model.embed_tokens.weight"])
        assert after[f"{layer}shared_head.head.weight"].equal(after["lm_head.weight"])


def test_untrained_layers_are_carried_bit_for_bit(case):
    folder = case[0]
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "carried" / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in after.items():
        if name.endswith("embed_tokens.weight"):
            assert tensor.equal(after["model.embed_tokens.weight"])
        elif name.endswith("head.weight"):
            assert tensor.equal(after["lm_head.weight"])
        else:
            kept = name.startswith(DEEPER) or "correction_bias" in name
            assert tensor.equal(before[name]) == kept, name


def test_a_config_that_says_nothing_has_no_layers(tmp_path):
    write_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layers, name in ((1, "num_nextn_predict_layers"), (2, "num_mtp_layers"), (0, None)):
        for key in ("num_nextn_predict_layers", "num_mtp_layers"):
            config.pop(key, None)
        (tmp_path / "config.json").write_text(json.dumps(config | ({name: layers} if name else {})))
        assert read_hf_config(tmp_path).num_nextn_predict_layers == layers
