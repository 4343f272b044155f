"""Training in blockwise FP8: gradients, layouts, the cache of codes, checkpoints, refusals.

Activations are quantised in tiles of 1 x 128, of one row each, and weights in blocks, so that
losses and input gradients do not depend on how rows are cut.  A weight's gradient takes tiles of
128 rows of one expert: it is the same only where the cut leaves those tiles whole, as here, where
half a batch has 128 rows.  Under tensor parallelism without expert parallelism every rank's
experts have the rows of half the tokens: other tiles, another rounding.  Where float32 itself
rounds otherwise (sums over ranks, products of other shapes) a value on the edge of two codes may
take the other one, and those after it: a hundredth of FP8's own noise, no longer 1e-6.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from fp8_codes import check_codes, codes_of
from launch import TESTS, torchrun
from pydantic import ValidationError
from tiny_dense import tiny_dense_config, write_tiny_dense
from tiny_model import tiny_config, write_tiny_model, write_tiny_mtp_model
from torch.utils._python_dispatch import TorchDispatchMode

from r1kern import distributed
from r1kern.config import Model, Optim, Parallel
from r1kern.errors import UserError
from r1kern.hf.fp8_fit import refuse_fp8
from r1kern.model.fp8 import Precision, Weights, finish_counting
from r1kern.types import Sequence

# Cut in two by tensor parallelism, every linear still has whole blocks.
WIDE = dict(
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    n_shared_experts=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_rope_head_dim=64,
    qk_nope_head_dim=64,
    v_head_dim=64,
)
EXPERTS = {"precision": "fp8_blockwise"}
ALL = EXPERTS | {"fp8_linears": True}
POWERS = ALL | {"fp8_scales": "power_of_two"}


@pytest.fixture(scope="module")
def world():
    yield distributed.start(seed=0)
    distributed.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    write_tiny_model(root / "moe", seed=3)
    write_tiny_dense(root / "dense", "qwen2", seed=1)
    write_tiny_mtp_model(root / "mtp", layers=2, depths=1)
    return root


def build(world, model, options, **more):
    from r1kern.train.policy import Policy

    options = Model(path=str(model), dtype="float32", **options)
    return Policy(options, Parallel(), Optim(lr=1e-2, eps=1e-2), world, total_updates=9, **more)


def batches(policy) -> list:
    """Two ragged micro-batches."""
    from r1kern.train.packing import pack

    generator = torch.Generator().manual_seed(5)

    def ids(count):
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    sequences = [Sequence(ids(2 + i % 3), ids(n)) for i, n in enumerate((40, 3, 19, 1, 28, 9))]
    made = pack(sequences, budget=70, dp=1, dp_rank=0, hf=policy.hf)
    assert len(made) == 2
    return made


def update(policy, **more) -> dict[str, float]:
    from workers.layouts import weighted_nll

    return policy.update(batches(policy), weighted_nll({"tokens": 100}), **more)


def gradients(policy, **more) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of one update, by parameter."""
    found, step = {}, policy.optimizer.step

    def keep_and_step():
        found.update((n, p.main_grad.clone()) for n, p in policy.model.named_parameters())
        return step()

    policy.optimizer.step = keep_and_step
    metrics = update(policy, **more)
    return found, metrics


@pytest.fixture(scope="module")
def exact(world, folder):
    """By model: the float32 model's gradients, and its choice of experts."""

    def measure(model, **options):
        policy = build(world, folder / model, options)
        with policy.record_experts() as choices:
            policy.logprobs(batches(policy))
        return gradients(policy)[0], choices

    return {
        "moe": measure("moe"),
        "dense": measure("dense"),
        "mtp": measure("mtp", mtp_coef=0.3),
    }


def cosine(a, b) -> float:
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


@pytest.mark.parametrize(
    ("model", "options", "whole", "each"),
    [
        ("moe", EXPERTS, 0.99, 0.98),
        ("moe", ALL, 0.97, 0.9),
        ("moe", POWERS, 0.97, 0.9),
        ("dense", ALL, 0.97, 0.9),
        ("mtp", ALL | {"mtp_coef": 0.3}, 0.97, 0.75),  # an expert has a row or two
    ],
    ids=["experts", "linears", "powers of two", "dense", "mtp"],
)
def test_gradients_are_those_of_float32_within_the_noise_of_fp8(
    world, folder, exact, model, options, whole, each
):
    """With the same experts: where another is chosen, its gradient has other rows."""
    truth, choices = exact[model]
    more = {} if model == "dense" else {"choices": choices, "replay": True}
    found, metrics = gradients(build(world, folder / model, options), **more)
    assert found.keys() == truth.keys()
    cosines = {name: cosine(g, truth[name]) for name, g in found.items()}
    assert min(cosines.values()) > each, min(cosines, key=cosines.get)
    flat = (torch.cat([g.flatten() for g in gs.values()]) for gs in (found, truth))
    assert whole < cosine(*flat) < 0.99999
    assert metrics["fp8_nan"] == 0
    assert 0 < metrics["fp8_underflow"] < 1e-3


def test_codes_that_are_nan_are_counted(world, folder):
    policy = build(world, folder / "dense", ALL)
    policy.model.decoder.layers[-1].mlp.linear_fc1.weight.data[3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        update(policy)
    assert finish_counting(policy.model)["fp8_nan"] > 1  # the weight's, and what came of it


def test_recomputation_gives_the_same_gradients(world, folder):
    truth, _ = gradients(build(world, folder / "moe", ALL))
    for parts in (["full"], ["moe", "mla_up_proj", "mlp"]):
        found, _ = gradients(build(world, folder / "moe", ALL, recompute=parts))
        for name, gradient in truth.items():
            assert torch.equal(found[name], gradient), (parts, name)


def test_layouts_with_the_same_tiles_give_the_same_update(world, folder):
    from workers.fp8_layouts import run

    write_tiny_model(folder / "wide", seed=3, **WIDE)
    exact = run(world, folder / "wide", 1, precision="dtype", fp8_linears=False)
    truth = {n: run(world, folder / "wide", n) for n in (1, 2)}
    same = {"1,1,1": 2, "1,2,1": 1, "1,1,2": 2, "2,2,1": 1}  # micro-batches with the same tiles
    out = folder / "layouts.json"
    torchrun(2, TESTS / "workers" / "fp8_layouts.py", folder / "wide", out, *same, "2,1,1")
    found = json.loads(out.read_text())
    off = {name: relative(metrics, truth[same.get(name, 1)]) for name, metrics in found.items()}
    # The last bits of float32 sums tip some codes over; FP8 itself moves the norm by 4e-3.
    for layout in same:
        assert off[layout]["loss"] < 2e-4, off
        assert off[layout]["grad_norm"] < 4e-4, off
    assert max(relative(found["1,1,1"], found["1,1,2"]).values()) < 1e-6
    noise, other_tiles = relative(truth[1], exact), relative(truth[1], truth[2])
    assert noise["loss"] > 3e-4
    assert min(noise["grad_norm"], 3e-3) > other_tiles["grad_norm"] > 2e-4
    assert off["2,1,1"]["grad_norm"] < 3e-3


def relative(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: abs(a[name] / b[name] - 1) for name in ("loss", "grad_norm")}


# -- the cache of codes ---------------------------------------------------------------------------


class Quantisations(TorchDispatchMode):
    """Counts how often weights are quantised within the block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.r1kern.fp8_quantize_weights.default
        return func(*args, **(kwargs or {}))


def test_codes_are_made_once_for_every_change_of_the_weights(world, folder):
    policy = build(world, folder / "moe", ALL)
    policy.keep_reference()
    products = len(list(codes_of(policy.model)))
    assert products == 3 * 5 + 2 + 2 * 4  # attention; dense MLP; experts and shared experts
    with Quantisations() as made:
        update(policy)
    assert made.count == products, "both micro-batches, forward and backward"
    assert check_codes(policy.model) == 0, "the optimizer's step changed the weights"
    with Quantisations() as made:
        before = policy.logprobs(batches(policy))
        policy.logprobs(batches(policy))
    assert made.count == check_codes(policy.model) == products
    with policy.reference():
        reference = policy.logprobs(batches(policy))
        assert check_codes(policy.model) == products
    assert not torch.equal(reference[0], before[0])
    assert torch.equal(policy.logprobs(batches(policy))[0], before[0])
    assert check_codes(policy.model) == products
    policy.host_copies.out()
    assert check_codes(policy.model) == 0


def test_a_checkpoint_has_no_trace_of_fp8(world, folder, tmp_path):
    """Written with FP8 it is read without, and the other way round."""
    from r1kern.train.checkpoint import Checkpoints

    for first, second in ((ALL, {}), ({}, ALL)):
        writer, reader = (build(world, folder / "moe", options) for options in (first, second))
        assert list(writer.model.state_dict()) == list(reader.model.state_dict())
        update(writer)
        reader.logprobs(batches(reader))  # codes of weights that will be gone
        checkpoints = Checkpoints(tmp_path / writer.options.precision, keep_last=2)
        checkpoints.save(writer, 1, {})
        checkpoints.load(reader, checkpoints.latest())
        for (name, mine), (_, theirs) in zip(reader.export(), writer.export(), strict=True):
            assert torch.equal(mine, theirs), name
        assert check_codes(reader.model) == 0


def test_frozen_weights_have_codes_for_the_forward_only(world, folder):
    from r1kern.model import fp8

    policy = build(world, folder / "moe", ALL)
    expected = policy.logprobs(batches(policy))
    fp8.forget(policy.model)
    policy.model.requires_grad_(False)
    for mine, theirs in zip(policy.logprobs(batches(policy)), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert all(weights.made.codes_t.numel() == 0 for _, _, weights in codes_of(policy.model))


def test_what_is_lost_is_counted(world, folder):
    """Weights far below the largest of their block become 0."""
    policy = build(world, folder / "moe", EXPERTS)
    clean = update(policy)["fp8_underflow"]
    experts = policy.model.decoder.layers[1].mlp.experts
    with torch.no_grad():
        for weight in experts.linear_fc2.weights:
            weight.mul_(1e-9)[0, 0] = 1.0
    assert update(policy)["fp8_underflow"] > clean + 0.05


def test_rows_padded_to_whole_blocks_change_nothing():
    x, weight = torch.randn(70, 256), torch.nn.Parameter(torch.randn(192, 256))

    def run(whole):
        fp8 = Weights(Precision(linears=True))
        fp8.whole_blocks, weight.grad, leaf = whole, None, x.clone().requires_grad_()
        with torch.no_grad():
            fp8.linear(x, weight)  # makes the codes that the pass with a gradient uses
        out = fp8.linear(leaf, weight)
        out.square().sum().backward()
        return fp8.made.codes.shape[1], out, leaf.grad, weight.grad

    (rows, *plain), (padded_rows, *padded) = run(False), run(True)
    assert (rows, padded_rows) == (192, 256)
    for a, b in zip(padded, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4 * b.abs().max().item())


# -- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8_linears": True}, "options of precision = fp8_blockwise"),
        ({"fp8_scales": "power_of_two"}, "options of precision = fp8_blockwise"),
        (ALL | {"transformer_engine": True}, "fp8_linears replaces the linears"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Model(path="x", **options)


def refusal(hf, options, *, tp=1, recompute=(), device="cpu") -> str:
    model = Model(path="x", **options)
    with pytest.raises(UserError) as error:
        refuse_fp8(hf, model, Parallel(tp=tp), recompute=recompute, device=device)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_that_cannot_be_computed_in_fp8_are_refused_with_all_reasons():
    assert "qwen2 has no experts (set model.fp8_linears=true)" in refusal(
        tiny_dense_config("qwen2"), EXPERTS
    )
    said = refusal(tiny_config(), EXPERTS, recompute=["moe_act"], device="cuda")
    assert "take moe_act out of recompute" in said
    assert "mlp.experts.gate_proj is 64 x 64 on a rank" in said
    assert "shared_experts" not in said
    wide = tiny_config(**WIDE)
    fits = partial(refuse_fp8, recompute=(), device="cuda")
    fits(wide, Model(path="x", **EXPERTS), Parallel(tp=4))
    said = refusal(wide, ALL, tp=4, device="cuda")
    assert "mlp.shared_experts.up_proj is 64 x 256 on a rank" in said
    assert "kv_a_proj_with_mqa" not in said  # 192 rows, which are padded
    refuse_fp8(tiny_config(), Model(path="x"), Parallel(), recompute=(), device="cuda")
