"""Generator and trainer quantise alike, and a GRPO step never uses codes of other weights."""

from __future__ import annotations

import json

import pytest
import torch
from fp8_codes import codes_of
from launch import ROOT, TESTS, torchrun
from tiny_model import write_tiny_model

from r1kern import distributed
from r1kern.config import Model, Optim, Parallel
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.generate import fp8
from r1kern.hf.fp8_blocks import SCALE, is_quantised


@pytest.fixture(scope="module")
def world():
    yield distributed.start(seed=0)
    distributed.shutdown()


@pytest.mark.parametrize("scales", ["float32", "power_of_two"])
def test_generator_and_trainer_quantise_identically(world, tmp_path, scales):
    """Every tensor that is sent in FP8, bit for bit what the trainer multiplies by."""
    from r1kern.model.local import local_tensors
    from r1kern.train.policy import Policy

    write_tiny_model(tmp_path, seed=3, hidden_size=160, moe_intermediate_size=136)  # ragged blocks
    options = dict(precision="fp8_blockwise", fp8_linears=True, fp8_scales=scales)
    policy = Policy(
        Model(path=str(tmp_path), dtype="float32", **options),
        Parallel(),
        Optim(),
        world,
        total_updates=1,
    )
    names = {name: slot.names for name, _, slot in local_tensors(policy.model)}
    bucket = list(policy.export())
    sent = dict(fp8.publish(bucket, power_of_two=scales == "power_of_two"))
    values = dict(fp8.emulate(bucket, power_of_two=scales == "power_of_two"))
    compared = set()
    for layer, weights, side in codes_of(policy.model):
        made = side.of(weights, True)
        for i, (codes, scale) in enumerate(zip(made.codes, made.scales, strict=True)):
            stem = f"{layer}.weight{i}" if len(weights) > 1 else f"{layer}.weight"
            parts = names[stem]
            assert len(parts) == made.parts
            for name, own, factors in zip(
                parts, codes.chunk(made.parts), scale.chunk(made.parts), strict=True
            ):
                assert torch.equal(own.view(torch.uint8), sent[name].view(torch.uint8)), name
                assert torch.equal(factors, sent[name + SCALE]), name
                wide = factors.repeat_interleave(128, 0).repeat_interleave(128, 1)
                restored = own.float() * wide[: len(own), : own.shape[1]]
                assert torch.equal(values[name], restored), name
                compared.add(name)
    assert compared == {name for name, _ in bucket if is_quantised(name)}
    assert values.keys() == dict(bucket).keys()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict:
    """Two GRPO steps and a resume with trainer and generator in FP8, two updates a batch, KL."""
    root = tmp_path_factory.mktemp("fp8_grpo")
    tokenizer = build_demo_tokenizer()
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=128)
    write_tiny_model(root / "model", seed=3, **sizes, **ends)
    tokenizer.save_pretrained(root / "model")
    worker, out = TESTS / "workers" / "fp8_grpo.py", root / "out.json"
    torchrun(1, worker, out, ROOT / "configs" / "demo.yaml", root / "model", root / "run")
    return json.loads(out.read_text())


def test_a_grpo_step_never_uses_codes_of_other_weights(run):
    """After every pass and every change of weights; the quantiser runs once for each change."""
    products = run["products"]
    assert products == 3 * 5 + 2 + 2 * 4  # attention; dense MLP; experts and shared experts
    for step in run["steps"]:
        # old policy; reference; the policy again; after the first update
        assert step["quantised"] == 4 * products
        kept = {("logprobs", products), ("reference", 0), ("update", 0)}
        assert {tuple(found) for found in step["passes"]} == kept
    assert run["loaded"] == 0
    assert run["resumed"] == run["saved"]


def test_trainer_and_generator_in_fp8_agree_within_the_noise_of_activations(run):
    for step in run["steps"]:
        assert step["fp8_nan"] == 0
        assert 0 < step["fp8_underflow"] < 0.01
        assert 1e-5 < step["mismatch"] < 0.5  # random logits are steep, and experts flip
