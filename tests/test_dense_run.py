"""SFT and GRPO of dense models with vLLM beside the trainer: `model.path` is all that changes."""

from __future__ import annotations

import json

import pytest
from launch import TESTS, torchrun
from safetensors.torch import load_file
from tiny_dense import write_tiny_dense

from r1kern.data.tokenizer import build_demo_tokenizer

WORKER = TESTS / "workers" / "dense_run.py"
MODELS = {"qwen2": {"tie_word_embeddings": True}, "llama": {}}
LAYOUTS = {
    "one": (1, []),
    "tp": (2, ["parallel.tp=2", "parallel.generator_tp=2"]),
    "pp": (2, ["parallel.pp=2"]),
}
FULL = [pytest.param(name, marks=pytest.mark.full) for name in ("tp", "pp")]


@pytest.fixture(scope="module", params=["one", *FULL])
def found(request, tmp_path_factory):
    """Per model what the worker measured, and the folder it left."""
    processes, overrides = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp("dense_run")
    tokenizer = build_demo_tokenizer()
    for kind, more in MODELS.items():
        write_tiny_dense(
            root / kind / "base",
            kind,
            seed=3,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_hidden_layers=2,
            # Sizes of vLLM's CPU attention, which knows no head of 16.
            hidden_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            **more,
        )
        tokenizer.save_pretrained(root / kind / "base")
    pairs = [{"problem": f"{i} + 1", "completion": f" {i + 1}"} for i in range(8)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    torchrun(processes, WORKER, root, *MODELS, "--", *overrides)
    return {kind: (json.loads((root / kind / "found.json").read_text()), root) for kind in MODELS}


@pytest.mark.parametrize("kind", list(MODELS))
def test_trainer_and_generator_agree_before_and_after_updates(found, kind):
    measured, root = found[kind]
    assert measured["sft"] == sorted(measured["sft"], reverse=True)
    first, second = measured["steps"]
    assert 0 < first["max_mismatch"] < 1e-4
    assert 0 < second["max_mismatch"] < 1e-4
    assert second["kl"] > 1e-4, "the update moved nothing"
    assert measured["equal"]
    assert measured["off"] < 1e-4
    tensors = load_file(root / kind / "model" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (kind == "llama")
    config = json.loads((root / kind / "model" / "config.json").read_text())
    assert config == json.loads((root / kind / "base" / "config.json").read_text())


def test_without_the_remedy_for_tied_heads_vllm_is_silently_wrong(found):
    tied, untied = (found[kind][0]["off without the remedy"] for kind in ("qwen2", "llama"))
    assert tied > 1e-2
    assert untied < 1e-4
