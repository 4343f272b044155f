"""Qwen2 and Llama-3 are transformers' models, and train alike, under every parallel layout."""

from __future__ import annotations

import pytest
import torch
from launch import TESTS, torchrun
from safetensors.torch import load_file
from tiny_dense import tiny_dense_config, write_tiny_dense
from tiny_model import tiny_config
from transformers import AutoModelForCausalLM

from r1kern.config import Experts, Model, Parallel
from r1kern.errors import UserError
from r1kern.hf.config import check_layout, read_hf_config
from r1kern.hf.dense import refuse_moe_options
from r1kern.types import Sequence

WORKER = TESTS / "workers" / "layouts.py"

MODELS = {
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
}

# Processes -> models, and TP,EP,PP,token budget of a micro-batch
LAYOUTS = {
    1: (list(MODELS), ["1,1,1,2000"]),
    2: (list(MODELS)[:2], ["1,1,1,60", "2,1,1,100", "1,1,2,60"]),
}
ALL_LAYOUTS = {
    1: (list(MODELS), ["1,1,1,2000", "1,1,1,60"]),
    2: (list(MODELS), ["1,1,1,60", "2,1,1,100", "1,1,2,60"]),
    4: (list(MODELS), ["1,1,4,60", "2,1,1,60", "2,1,2,100", "4,1,1,100"]),
}


def write_truth(folder, kind: str, overrides: dict) -> None:
    """A random model, transformers' logits of it, and a ragged batch to train on."""
    config = write_tiny_dense(folder / "model", kind, seed=1, **overrides)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(2)

    def ids(count):
        return torch.randint(3, config.vocab_size, (count,), generator=generator)

    documents = [ids(n) for n in (7, 70, 19, 4)]  # llama's rope is stretched beyond 32
    dense = torch.stack([ids(96), ids(96)])
    sequences = [
        Sequence(tuple(ids(2 + i % 5).tolist()), tuple(ids(1 + 3 * i).tolist())) for i in range(13)
    ]
    with torch.no_grad():
        logits = model(dense).logits.transpose(0, 1).flatten(0, 1)
        packed = torch.cat([model(d[None]).logits[0] for d in documents])
    truth = {
        "ids": dense,
        "documents": documents,
        "dense": logits,
        "packed": packed,
        "weights": load_file(folder / "model" / "model.safetensors"),
        "sequences": sequences,
        "tokens": sum(len(s.completion_ids) for s in sequences),
    }
    torch.save(truth, folder / "truth.pt")


def folder_name(model: str) -> str:
    return model.replace(", ", "_")


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    for model, (kind, overrides) in MODELS.items():
        write_truth(root / folder_name(model), kind, overrides)
    return root


def measure(root, plan) -> dict[str, dict[str, dict]]:
    """Model -> layout -> what the worker found; one start for each number of processes."""
    torch.serialization.add_safe_globals([Sequence])
    found = {model: {} for model in MODELS}
    for processes, (models, layouts) in plan.items():
        words = []
        for model in models:
            folder = root / folder_name(model)
            out = folder / f"{len(plan)}_{processes}"
            out.mkdir()
            words += ["--", folder / "model", folder / "truth.pt", out, *layouts]
        torchrun(processes, WORKER, *words[1:])
        for model in models:
            out = root / folder_name(model) / f"{len(plan)}_{processes}"
            for layout in layouts:
                result = torch.load(out / f"{layout.replace(',', '_')}.pt")
                found[model][f"{processes} x {layout}"] = result
    return found


@pytest.fixture(scope="module", params=["part", pytest.param("all", marks=pytest.mark.full)])
def results(request, truths):
    return measure(truths, LAYOUTS if request.param == "part" else ALL_LAYOUTS)


@pytest.fixture(params=list(MODELS))
def model(request):
    return request.param


def test_logits_match_transformers(results, truths, model):
    truth = torch.load(truths / folder_name(model) / "truth.pt")
    for layout, result in results[model].items():
        assert set(result["parity"]) == {"dense", "packed"}, layout
        for kind, difference in result["parity"].items():
            assert difference < 3e-6 * truth[kind].abs().max(), (layout, result["parity"])


def test_export_gives_back_what_was_imported(results, model):
    errors = {layout: result["export"] for layout, result in results[model].items()}
    assert errors == dict.fromkeys(errors, 0.0)


def test_updates_do_not_depend_on_the_layout(results, model):
    one = results[model]["1 x 1,1,1,2000"]
    assert one["microbatches"] == 1
    for layout, result in results[model].items():
        assert result["logps"] == pytest.approx(one["logps"], rel=1e-6), layout
        for mine, theirs in zip(result["updates"], one["updates"], strict=True):
            # losses are sums of terms of order 1 that cancel in part
            for name in ("loss", "grad_norm", "entropy", "max_logp"):
                wanted = pytest.approx(theirs[name], rel=3e-6, abs=3e-6)
                assert mine[name] == wanted, (layout, name)
        assert result["weights"].keys() == one["weights"].keys()
        for name, weight in one["weights"].items():
            error = (result["weights"][name] - weight).norm() / (weight.norm() + 1e-9)
            assert error < 1e-5, (layout, name)


def test_updates_change_every_weight(results, truths, model):
    before = load_file(truths / folder_name(model) / "model" / "model.safetensors")
    after = results[model]["1 x 1,1,1,2000"]["weights"]
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != model.endswith("tied")
    assert [n for n in before if torch.equal(before[n], after[n])] == []


def test_impossible_layouts_name_the_remedy():
    hf = tiny_dense_config("qwen2", num_key_value_heads=2)
    with pytest.raises(UserError, match=r"tp=4 does not divide num_key_value_heads=2 \(try 2\)"):
        check_layout(hf, Parallel(tp=4), 4)
    with pytest.raises(UserError, match=r"ep=2 does not divide 1 \(a dense model .*\(try 1\)"):
        check_layout(hf, Parallel(ep=2), 2)
    check_layout(hf, Parallel(tp=2), 4)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias, mlp_bias: choose"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'linear'",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "sliding-window",
        ),
    ],
)
def test_what_the_trainer_lacks_is_refused(tmp_path, kind, overrides, message):
    tiny_dense_config(kind, **overrides).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(tmp_path)
    assert "\n" not in str(error.value)


def test_options_of_experts_are_refused():
    experts = Experts(bias_update_rate=1e-3, replay="old_policy")
    refuse_moe_options(tiny_config(), Model(path="x", mtp_coef=0.1), experts)
    refuse_moe_options(tiny_dense_config("llama"), Model(path="x"), Experts())
    wanted = r"experts\.bias_update_rate, experts\.replay, model\.mtp_coef: llama is a dense"
    with pytest.raises(UserError, match=wanted):
        refuse_moe_options(tiny_dense_config("llama"), Model(path="x", mtp_coef=0.1), experts)
