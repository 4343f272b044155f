"""PPO: advantages against the paper's sums, losses against plain torch, and whole runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import ROOT, TESTS, torchrun
from safetensors.torch import load_file, save_file
from test_config import MINIMAL, refused
from test_run import arguments, assert_equal_runs, model  # noqa: F401  (a fixture)
from tiny_model import write_tiny_model

from r1kern import cli, distributed, ops
from r1kern.config import GRPO, PPOConfig, parse_config
from r1kern.errors import UserError
from r1kern.hf.scalar_head import describe_scalar_head
from r1kern.report.metrics import read_metrics
from r1kern.types import Completion, Prompt, Rollout, Score, Sequence

WORKER = TESTS / "workers" / "ppo.py"
LOOP = TESTS / "workers" / "train.py"
CONFIG = ROOT / "configs" / "ppo_demo.yaml"


@pytest.fixture(scope="module", autouse=True)
def world():
    """Megatron on CPU must be in place before the trainer's modules are imported."""
    yield distributed.start(seed=0)
    distributed.shutdown()


# -- advantages -----------------------------------------------------------------------------------


def gae_by_the_book(rewards, values, gamma, lam):
    """Equations 12 and 16 of arXiv 1506.02438, term by term, in Python's float64."""
    T = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, T)) for t in range(T)]


ragged = st.lists(
    st.lists(st.tuples(*[st.floats(-10, 10, width=32)] * 2), max_size=19), min_size=1, max_size=5
)
unit = st.one_of(st.sampled_from([0.95, 1.0]), st.floats(0.01, 1))


def grids(sequences):
    """Rewards and values [B, S], NaN under the mask, and the mask."""
    shape = len(sequences), max(map(len, sequences))
    rewards, values, mask = (torch.full(shape, math.nan) for _ in range(3))
    mask.zero_()
    for b, steps in enumerate(sequences):
        for t, (reward, value) in enumerate(steps):
            rewards[b, t], values[b, t], mask[b, t] = reward, value, 1
    return rewards, values, mask


@settings(max_examples=60, deadline=None)
@given(ragged, unit, st.one_of(st.just(0.0), unit))
def test_gae_is_the_sum_of_the_paper(sequences, gamma, lam):
    from r1kern.train.advantage import gae

    rewards, values, mask = grids(sequences)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert advantages.dtype == torch.float32
    assert not advantages[mask == 0].any()
    assert not returns[mask == 0].any()
    for b, steps in enumerate(sequences):
        expected = gae_by_the_book([r for r, _ in steps], [v for _, v in steps], gamma, lam)
        assert advantages[b, : len(steps)].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-3)
        for t, (_, value) in enumerate(steps):
            assert returns[b, t].item() == pytest.approx(expected[t] + value, rel=1e-5, abs=1e-3)


def test_the_reward_is_at_the_last_token_and_the_kl_at_every_one():
    from r1kern.train.advantage import token_rewards

    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    old = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, math.nan, math.nan], [math.nan] * 3])
    ref = torch.tensor([[-1.5, -2.0, -1.0], [-1.0, math.nan, math.nan], [math.nan] * 3])
    found = token_rewards(torch.tensor([2.0, -1.0, 5.0]), mask, old, ref, 0.1)
    expected = [[-0.05, 0.0, 2.2], [-1.05, 0, 0], [0, 0, 0]]
    assert torch.allclose(found, torch.tensor(expected))
    plain = token_rewards(torch.tensor([2.0, -1.0, 5.0]), mask, None, None, 0.0)
    assert plain.tolist() == [[0, 0, 2], [-1, 0, 0], [0, 0, 0]]


# -- losses ---------------------------------------------------------------------------------------

LENGTHS = (5, 1, 9, 3, 7)


def packed(seed=0, budget=64):
    """Micro-batches with everything that a PPO update needs, and that as one flat table."""
    from r1kern.train.packing import pack

    generator = torch.Generator().manual_seed(seed)
    sequences, first = [], 10
    for n in LENGTHS:
        sequences.append(Sequence((1, 2), tuple(range(first, first + n)), 1.0, (-1.0,) * n))
        first += n
    table = torch.randn(first, 5, generator=generator)  # by token: present, old, A, V_old, R
    table[:, :2] = -table[:, :2].abs() / 2 - 0.2
    batches = pack(sequences, budget=budget, dp=1, dp_rank=0)
    fields = ("old_logps", "token_advantages", "values", "returns")
    return [
        replace(b, {f: b.grid(table[b.targets, i]) for i, f in enumerate(fields, 1)})
        for b in batches
    ], table[10:]


def replace(batch, fields):
    import dataclasses

    return dataclasses.replace(batch, **fields)


def head_of(batch, logp):
    """Hidden states that are the logits themselves, with the log-probs `logp` [N]."""
    from r1kern.train.head import Head

    V = 64
    p = logp.exp()[:, None]
    logits = ((1 - p) / (V - 1)).log().expand(-1, V).scatter(1, batch.targets[:, None], p.log())
    return Head(logits.requires_grad_(), torch.eye(V), batch.targets, {"temperature": 1.0})


@pytest.mark.parametrize("budget", [64, 12])
def test_the_policy_loss_is_the_clipped_objective_in_float64(budget):
    from r1kern.train.ppo_objective import ppo_policy_loss

    batches, table = packed(budget=budget)
    N, total, clipped, gradient = len(table), 0.0, 0.0, torch.zeros(len(table) + 10)
    for batch in batches:
        logp = table[batch.targets - 10, 0]
        head = head_of(batch, logp)
        loss, metrics = ppo_policy_loss(head, batch, options=GRPO(clip_high=0.3), num_tokens=N)
        loss.backward()
        total, clipped = total + loss.item(), clipped + metrics["clip_fraction"].item()
        own = head.hidden.grad.gather(1, batch.targets[:, None])[:, 0]
        gradient[batch.targets] = own / (1 - logp.exp())  # d logp_t / d logit_t = 1 - p_t
    logp, old, A = table[:, :3].double().unbind(1)
    logp.requires_grad_()
    rho = (logp - old).exp()
    expected = -torch.minimum(rho * A, rho.clamp(0.8, 1.3) * A).mean()
    expected.backward()
    assert len(batches) == (1 if budget == 64 else 3)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient[10:].double(), logp.grad, rtol=1e-4, atol=1e-7)
    assert clipped == pytest.approx((logp.grad == 0).double().mean().item())
    assert 0.1 < clipped < 0.9


@pytest.mark.parametrize("clip", [0.4, None])
def test_the_value_loss_is_the_clipped_square_in_float64(clip):
    from r1kern.train.ppo_objective import value_loss

    torch.manual_seed(0)
    values, old, returns = torch.randn(3, 200).unbind(0)
    values.requires_grad_()
    losses, active = value_loss(values, old, returns, clip)
    losses.sum().backward()
    v, o, r = (x.detach().double() for x in (values, old, returns))
    v.requires_grad_()
    expected = (v - r) ** 2 / 2
    if clip is not None:
        moved = torch.where(v > o + clip, o + clip, torch.where(v < o - clip, o - clip, v))
        expected = torch.where((moved - r) ** 2 > 2 * expected, (moved - r) ** 2 / 2, expected)
    expected.sum().backward()
    assert torch.allclose(losses.double(), expected, rtol=1e-5)
    assert torch.allclose(values.grad.double(), v.grad, rtol=1e-5)
    assert active.any() == (clip is not None)
    assert not values.grad[active].any()


def test_without_values_every_token_has_its_completions_reward():
    """lam = gamma = 1 and V = 0: REINFORCE with a clip, GRPO's objective with given advantages."""
    from r1kern.train.advantage import gae, token_rewards
    from r1kern.train.ppo_objective import ppo_policy_loss

    (batch,), table = packed(seed=3)
    rewards = torch.linspace(-1, 2, len(LENGTHS))
    of_tokens = token_rewards(rewards, batch.mask, None, None, 0.0)
    advantages, returns = gae(of_tokens, torch.zeros_like(batch.mask), batch.mask)
    assert torch.equal(advantages, rewards[:, None] * batch.mask)
    assert torch.equal(returns, advantages)
    logp = table[batch.targets - 10, 0]
    head = head_of(batch, logp)
    batch = replace(batch, {"token_advantages": advantages})
    loss, metrics = ppo_policy_loss(head, batch, options=GRPO(), num_tokens=len(table))
    expected, theirs = ops.grpo_loss(
        batch.grid(logp), batch.old_logps, None, rewards, batch.mask, beta=0.0, normalizer="token"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["clip_fraction"].item() == pytest.approx(theirs["clip_fraction"].item())


def test_a_failed_grader_is_left_out_and_its_reward_is_not_zero():
    from r1kern.train.ppo_objective import to_rewarded

    completions = [Completion((3, 4), (-1.0, -1.0), "x", f) for f in ("stop", "stop", "length")]
    scores = Score({}, 0.7), Score({}, 0.0, failure="crashed"), Score({}, 0.2)
    rollout = Rollout(Prompt("p", (1,), "1", "?"), tuple(completions), 0, scores)
    assert [s.advantage for s in to_rewarded([rollout], GRPO())] == [0.7, 0.2]
    assert [s.advantage for s in to_rewarded([rollout], GRPO(drop_truncated=True))] == [0.7]


def test_moments_whiten_to_mean_0_and_deviation_1(world):
    import torch.distributed as dist

    from r1kern.train.advantage import Moments, explained_variance

    torch.manual_seed(0)
    x, mask = 3 + 2 * torch.randn(4, 30), torch.ones(4, 30)
    mask[1, 5:] = 0
    moments = Moments([x[:2][mask[:2] > 0], x[2:].flatten()], dist.group.WORLD)
    white = moments.whiten(x.where(mask > 0, torch.nan), mask)
    assert not white[mask == 0].any()
    shown = white[mask > 0].double()
    assert shown.mean().abs() < 1e-6
    assert shown.std(correction=0) == pytest.approx(1, rel=1e-5)
    half = Moments([x.flatten() / 2], dist.group.WORLD)
    whole = Moments([x.flatten()], dist.group.WORLD)
    assert explained_variance(half, whole) == pytest.approx(0.75)
    none = Moments([torch.ones(3)], dist.group.WORLD)
    assert math.isnan(explained_variance(none, none))


def test_options_that_have_no_part_in_ppo_are_refused(capfd):
    assert parse_config(PPOConfig, MINIMAL).ppo.lam == 1.0
    assert cli.run(["ppo", str(CONFIG), "grpo.kl=k2"]) == 2
    assert "grpo.kl has no part in PPO: remove it" in capfd.readouterr().err
    message = refused(MINIMAL | {"grpo": {"normalizer": "token"}}, PPOConfig)
    assert "grpo.normalizer has no part in PPO" in message
    message = refused(
        MINIMAL | {"train": {"steps": 3}, "ppo": {"critic_warmup_steps": 3}}, PPOConfig
    )
    assert "leaves none of train.steps = 3" in message


# -- whole models ---------------------------------------------------------------------------------

WHOLE, CUT = 4000, 60  # budgets: all in one micro-batch, and several
SAME = dict(rel=5e-6, abs=1e-6)  # float32: rounding of sums that are cut otherwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, and a critic whose values are far from 0."""
    folder = tmp_path_factory.mktemp("ppo")
    write_tiny_model(folder / "policy", seed=3, num_hidden_layers=4)
    write_tiny_model(folder / "critic", seed=4, num_hidden_layers=4)
    file, config = folder / "critic" / "model.safetensors", folder / "critic" / "config.json"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    tensors["score.weight"] = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) / 16
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps(describe_scalar_head(json.loads(config.read_text()))))
    return folder


@pytest.fixture(scope="module")
def truth(folder, world):
    """One rank with one micro-batch, in this process."""
    from workers.ppo import run

    return run(world, folder, WHOLE)


def short_run(model, folder, *more) -> list[str]:  # noqa: F811
    """Arguments of a PPO run in which random completions earn uneven rewards."""
    options = [
        "grpo.beta=0.01",
        "grpo.updates_per_batch=2",
        "optim.schedule=cosine",
        "ppo.critic_warmup_steps=1",
        "ppo.lam=0.95",
        "train.save_every=1",
    ]
    return [str(CONFIG), *arguments(model, folder, *options, *more)[1:]]


@pytest.fixture(scope="module")
def layouts(folder, model):  # noqa: F811
    """Two ranks, by tensor-parallel size, pipeline stages and budget; then a run."""
    cases, out = ["1,1", "2,1", "1,2"], folder / "out.json"
    cases = ";".join(f"{case},{CUT}" for case in cases)
    torchrun(2, WORKER, folder, out, cases, *short_run(model, folder / "run", "train.steps=3"))
    return json.loads(out.read_text())


@pytest.mark.full
def test_updates_do_not_depend_on_the_layout(truth, layouts):
    told = ("loss", "grad_norm", "kl", "kl_penalty", "clip_fraction", "advantage/std")
    told += tuple(f"value/{n}" for n in ("loss", "grad_norm", "mean", "explained_variance"))
    for case, found in layouts.items():
        assert found["microbatches"] == (1 if case == f"1,1,{CUT}" else 2)
        for mine, theirs in zip(found["updates"], truth["updates"], strict=True):
            for name in told:
                assert mine[name] == pytest.approx(theirs[name], **SAME), (case, name)
    first, second = truth["updates"]
    for update in (first, second):
        assert min(update["grad_norm"], update["value/grad_norm"]) > 0.1
        assert update["advantage/std"] > 0.1
        assert abs(update["kl_penalty"]) > 1e-3
    assert second["clip_fraction"] > 0.05
    assert second["value/loss"] < first["value/loss"]


@pytest.mark.full
def test_a_checkpoint_has_both_models_and_goes_on_bit_equal(truth, layouts):
    for found in (truth, *layouts.values()):
        assert found["again"] == found["updates"][1]
        assert found["equal"]
        assert found["versions"] == [2, 2]


@pytest.mark.full
def test_a_checkpoint_before_the_first_update(world, folder, tmp_path):
    """As of a policy that waits for its critic."""
    from workers.ppo import build, prepare, update

    from r1kern.train.checkpoint import Checkpoints

    policy, critic = build(world, folder, 1.0)
    checkpoints, batches = Checkpoints(tmp_path, keep_last=1), prepare(world, policy, WHOLE)
    checkpoints.save(policy, 1, {}, critic=critic)
    others = build(world, folder, 0.5)
    checkpoints.load(others[0], checkpoints.latest(), critic=others[1])
    for _ in range(2):
        assert update(*others, batches) == update(policy, critic, batches)
    checkpoints.save(policy, 2, {})
    with pytest.raises(UserError, match="a run without a critic: go on with `r1kern train`"):
        checkpoints.load(policy, checkpoints.latest(), critic=critic)


# -- whole runs -----------------------------------------------------------------------------------


def check_metrics(records):
    """Of a run with a step of warm-up and two updates a batch."""
    assert "clip_fraction" not in records[0]
    assert records[0]["weight_version"] == 0
    assert records[0]["value/mean"] == 0  # its head starts at 0
    for step, record in enumerate(records[1:], 1):
        assert record["weight_version"] == 2 * step
        assert 0 < record["max_mismatch"] < 1e-4
        assert record["kl"] > 0
    for step, record in enumerate(records):
        assert (abs(record["kl_penalty"]) > 1e-6) == (step > 1), step
        assert record["value/explained_variance"] <= 1
        assert min(record["value/loss"], record["value/grad_norm"], record["advantage/std"]) > 0
        assert record["seconds/update critic"] > 0
    assert records[-1]["value/mean"] != 0


@pytest.mark.full
def test_a_run(layouts, folder):
    check_metrics(read_metrics(folder / "run"))
    assert load_file(folder / "run" / "critic" / "model.safetensors")["score.weight"].any()


@pytest.mark.full
def test_killed_run_resumes_by_itself_bit_equal(model, tmp_path):  # noqa: F811
    torchrun(2, LOOP, "-", *short_run(model, tmp_path / "whole"))
    check_metrics(read_metrics(tmp_path / "whole"))
    phases = ["values", "update critic", "update", "save"]
    torchrun(2, LOOP, ",".join(phases), *short_run(model, tmp_path / "run"), restarts=4)
    assert (tmp_path / "run" / "kills").read_text().splitlines() == phases
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
