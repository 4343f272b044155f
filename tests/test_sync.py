"""Weights from any trainer layout into any generator layout, within the planned memory.

The worker (`workers/sync.py`) runs once for each generator layout; the tests judge what its ranks
measured.  Plans, the FP8 stream and host copies are tested in this process.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import TESTS, torchrun
from tiny_model import write_tiny_model
from transformers import DeepseekV3Config

from r1kern import distributed
from r1kern.errors import UserError
from r1kern.generate import SyncError, fp8, sleep, sync
from r1kern.types import Sequence

BUCKET_KIB = 96  # the embedding has 24, an expert 48, a layer's attention 65


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sync") / "model"
    write_tiny_model(folder, seed=1, num_hidden_layers=4)
    return folder


def measure(model: Path, ranks: int, generator_tp: int, *layouts: str) -> list[dict]:
    out = model.parent / f"{ranks}_{generator_tp}"
    out.mkdir()
    worker = TESTS / "workers" / "sync.py"
    torchrun(ranks, worker, model, out, generator_tp, BUCKET_KIB, *layouts)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.full), 2],
    ids=["generator-tp1", "generator-tp2"],
)
def two_ranks(request, model) -> list[dict]:
    return measure(model, 2, request.param, "2,1,1", "1,2,1", "1,1,2")


def check_layouts(ranks: list[dict]) -> None:
    layouts = [name for name in ranks[0] if "," in name]
    assert layouts
    for name in layouts:
        for rank in ranks:
            found = rank[name]
            assert found["wrong"] == [], name
            assert found["ordered"], name
            assert found["buckets"] > 10, name
            assert found["bytes"] == found["planned bytes"], name
            assert found["kept"] == 0, f"{name}: vLLM still holds tensors of a bucket"
            assert found["off"] < 1e-4, name
        assert max(rank[name]["measured"] for rank in ranks) == ranks[0][name]["planned"], name


def test_generator_has_the_trainers_weights_within_the_planned_memory(two_ranks):
    check_layouts(two_ranks)


def test_ranks_that_differ_are_named_before_any_collective(two_ranks):
    for number, rank in enumerate(two_ranks):
        agreements = rank["agreements"]
        assert "different of rank 1 and of rank 0 differ: v is v1" in agreements["different"]
        assert agreements["after"] == "agreed"
        if number == 0:
            assert agreements["absent"] == "absent: rank 1 did not come within 1 s"


def test_on_cpu_the_generator_neither_sleeps_nor_takes_fp8(two_ranks):
    for rank in two_ranks:
        assert not rank["slept"]
        assert rank["said"] == 1
        assert rank["fp8 on CPU"].startswith("UserError: generator.fp8 needs CUDA")
        weights = rank["weights"] / rank["generator_tp"]
        cache = 0.125 * 2**30
        assert 0.95 * (weights + cache) < rank["held"] < 1.2 * weights + cache + 2**21


@pytest.mark.full
@pytest.mark.parametrize("generator_tp", [2, 4])
def test_four_ranks(model, generator_tp):
    check_layouts(measure(model, 4, generator_tp, "2,1,2", "2,2,2", "1,4,1", "2,2,1"))


# -- the plan -----------------------------------------------------------------------------------


def plan_of(
    shapes, splits=None, *, tp=1, ep=1, layers=(4,), experts=16, bucket_bytes=1 << 20, copies=()
):
    from r1kern.model.sync_plan import plan_sync

    return plan_sync(
        shapes,
        splits or dict.fromkeys(shapes),
        dtype=torch.bfloat16,
        tp=tp,
        ep=ep,
        layers=list(layers),
        experts=experts,
        bucket_bytes=bucket_bytes,
        copies=dict(copies),
    )


layer_shapes = st.lists(st.integers(1, 9).map(lambda n: (4 * n, 8)), min_size=2, max_size=12)


@given(
    shapes=layer_shapes,
    tp=st.sampled_from([1, 2, 4]),
    ep=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    bucket_bytes=st.integers(64, 2000),
)
def test_plan_holds_every_tensor_once_and_no_two_in_one_place(shapes, tp, ep, pp, bucket_bytes):
    named = {"model.embed_tokens.weight": (32, 8)}
    for i in range(4):
        for j, shape in enumerate(shapes):
            dense = j % 3 == 0
            named[f"model.layers.{i}.mlp.{'x' if dense else 'experts'}.{j}.w"] = shape
    splits = {name: None if ".experts." in name else 0 for name in named}
    layers = {1: [4], 2: [1, 3], 4: [1, 1, 1, 1]}[pp]
    plan = plan_of(
        named, splits, tp=tp, ep=ep, layers=layers, experts=12, bucket_bytes=bucket_bytes
    )
    assert [item.name for bucket in plan.buckets for item in bucket.items] == list(named)
    assert plan.total_bytes == sum(2 * math.prod(shape) for shape in named.values())
    for bucket in plan.buckets:
        size = sum(item.nbytes for item in bucket.items)
        assert size <= bucket_bytes or len(bucket.items) == 1
        placed = sorted(
            (item.offset, item.offset + item.nbytes)
            for item in bucket.items
            if item.offset is not None
        )
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(placed))
        assert not placed or placed[-1][1] <= bucket.size
        travels = [pp > 1 or i.split is not None or i.expert_rank is not None for i in bucket.items]
        assert travels == [item.offset is not None for item in bucket.items]
        for item in bucket.items:
            if item.name.startswith("model.layers."):
                layer = int(item.name.split(".")[2])
                assert sum(layers[: bucket.stage]) <= layer < sum(layers[: bucket.stage + 1])


def test_tensor_above_the_bucket_has_its_own_and_sets_the_peak():
    shapes = {"model.embed_tokens.weight": (1000, 64), "model.layers.0.norm": (64,)}
    plan = plan_of(shapes, layers=(1, 1), bucket_bytes=1024)
    assert [len(bucket.items) for bucket in plan.buckets] == [1, 1]
    assert plan.peak_bytes == 128_000
    split = plan_of(shapes, dict.fromkeys(shapes, 0), tp=2, layers=(1, 1), bucket_bytes=1024)
    assert split.peak_bytes == 128_000 + 3 * 64_000
    assert plan_of(shapes, bucket_bytes=1024).peak_bytes == 0, "views of the parameters"
    assert plan.fingerprint != split.fingerprint


def test_copy_comes_from_the_stage_that_holds_its_source():
    shapes = {"model.embed_tokens.weight": (8, 8), "model.layers.4.embed_tokens.weight": (8, 8)}
    copies = dict([reversed(shapes)])
    plan = plan_of(shapes, layers=(2, 2), copies=copies)
    assert [bucket.stage for bucket in plan.buckets] == [0]
    assert [item.source for item in plan.buckets[0].items] == ["model.embed_tokens.weight"] * 2


def test_routing_bias_stays_float32():
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    (item,) = plan_of({name: (256,)}).buckets[0].items
    assert (item.dtype, item.nbytes) == (torch.float32, 1024)


def test_671b_is_planned_in_seconds(started):
    from r1kern.hf.names import hf_shapes, hf_splits

    shapes = hf_shapes(DeepseekV3Config())
    start = time.perf_counter()
    layers = [4] * 15 + [1]
    plan = plan_of(
        shapes, hf_splits(shapes), tp=4, ep=64, layers=layers, experts=256, bucket_bytes=1 << 30
    )
    assert time.perf_counter() - start < 30
    bias = 58 * 256
    assert plan.total_bytes == 2 * 671_026_404_352 + 4 * bias
    # a bucket that holds both embedding and head would be larger; each is 1.8 GB, cut over tp
    embedding = 2 * 129280 * 7168
    assert plan.peak_bytes == embedding * 9 // 4
    assert plan.moved_bytes["pp"] < plan.total_bytes // 20


# -- FP8, audit, sleep ----------------------------------------------------------------------------


def nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest e4m3 numbers by search over all of them; ties go to the even code."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    distance = (values.double().abs()[..., None] - table).abs()
    best = distance.argmin(-1)
    upper = (best + 1).clamp(max=0x7E)
    tie = (
        distance.gather(-1, upper[..., None])[..., 0]
        == distance.gather(-1, best[..., None])[..., 0]
    )
    best = torch.where(tie & (best % 2 == 1), upper, best)
    return best.to(torch.uint8) | (values.signbit().to(torch.uint8) << 7)


def test_fp8_stream_is_the_reference_and_passes_the_audit():
    gen = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(shape, generator=gen).bfloat16()

    q_a = "model.layers.0.self_attn.q_a_proj.weight"
    down = "model.layers.4.mlp.experts.7.down_proj.weight"
    zero = "model.layers.4.mlp.shared_experts.up_proj.weight"
    sent = {
        "model.embed_tokens.weight": noise(10, 8),
        q_a: noise(130, 257),
        "model.layers.4.mlp.gate.weight": noise(4, 8),
        down: 1e-3 * noise(128, 128),
        zero: torch.zeros(3, 200).bfloat16(),
    }
    expected = fp8.published_shapes({name: tuple(t.shape) for name, t in sent.items()})
    audit = sync.SentAudit(expected)
    stream = dict(audit.watch(fp8.publish(sent.items())))
    assert list(stream) == list(expected)
    assert audit.finish() == (zero,)
    for name in (q_a, down):
        codes, scales = stream[name], stream[name + "_scale_inv"]
        assert (codes.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                weight = sent[name][block].float()
                assert scales[i, j] == weight.abs().max() / 448
                assert torch.equal(
                    codes[block].view(torch.uint8), nearest_e4m3(weight / scales[i, j])
                )
    assert stream["model.layers.4.mlp.gate.weight"].dtype == torch.bfloat16


def test_fp8_audit_sees_nan():
    codes = torch.tensor([0.0, -448.0, math.nan]).to(torch.float8_e4m3fn)
    for tensor, verdict in ((codes[:2], None), (codes, "NaN or infinity sent in: w")):
        audit = sync.SentAudit({"w": tuple(tensor.shape)})
        list(audit.watch([("w", tensor)]))
        if verdict is None:
            assert audit.finish() == ()
        else:
            with pytest.raises(SyncError, match=verdict):
                audit.finish()


def test_sleep_refuses_an_allocator_that_frees_nothing():
    sleep.check_allocator({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})
    for value in ("expandable_segments:True", "max_split_size_mb:64, expandable_segments:True"):
        with pytest.raises(UserError, match=r"unset it or set generator\.sleep=false"):
            sleep.check_allocator({"PYTORCH_CUDA_ALLOC_CONF": value})


def test_sleep_that_frees_too_little_is_an_error_with_both_figures():
    sleep.check_freed(99 << 30, 100 << 30)
    with pytest.raises(RuntimeError, match=r"freed 1\.00 GiB.* are 2\.00 GiB.*expandable_segments"):
        sleep.check_freed(1 << 30, 2 << 30)
    whole = torch.zeros(100)
    assert sleep.storage_bytes([whole[:10], whole[50:], torch.zeros(2)]) == 408


# -- host copies ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started():
    yield distributed.start(seed=0)
    distributed.shutdown()


def trained(model, world, dtype: str, *, through_host: bool) -> tuple[dict, dict]:
    """Weights after three updates; what left memory in between, if it was made to."""
    from r1kern.config import Model, Optim, Parallel
    from r1kern.train.packing import pack
    from r1kern.train.policy import Policy

    policy = Policy(
        Model(path=str(model), dtype=dtype), Parallel(), Optim(lr=1e-3), world, total_updates=3
    )
    ids = torch.randint(3, 96, (6, 30), generator=torch.Generator().manual_seed(5)).tolist()
    batches = pack([Sequence(tuple(r[:4]), tuple(r[4:])) for r in ids], budget=90, dp=1, dp_rank=0)
    seen = {}
    for _ in range(3):
        policy.update(batches, lambda head, batch: (-head.logprobs()[0].mean(), {}))
        if through_host:
            freed, host = policy.host_copies.out()
            state = sum(p.numel() for p in policy.model.parameters())
            seen = {"freed": freed / state, "host": host / state, "again": policy.host_copies.out()}
            gradients = [b.grad_data for b in policy.ddp.buffers]
            seen["gradients"] = sum(g.untyped_storage().nbytes() for g in gradients)
            seen["exported"] = sum(t.float().abs().sum().item() for _, t in policy.export())
            policy.host_copies.back()
            policy.host_copies.back()
    return {name: t.clone() for name, t in policy.export()}, seen


@pytest.mark.parametrize(("dtype", "host_bytes"), [("float32", 8), ("bfloat16", 12)])
def test_state_that_went_through_host_memory_updates_bit_for_bit(model, started, dtype, host_bytes):
    kept, _ = trained(model, started, dtype, through_host=False)
    moved, seen = trained(model, started, dtype, through_host=True)
    for name, tensor in kept.items():
        assert torch.equal(tensor, moved[name]), name
    # moments, and main weights where the model's own are not float32; gradients are float32
    assert seen["host"] == pytest.approx(host_bytes, rel=0.01)
    assert seen["freed"] == pytest.approx(host_bytes + 4, rel=0.01)
    assert seen["gradients"] == 0
    assert seen["again"] == (0, 0)
    assert seen["exported"] > 0
