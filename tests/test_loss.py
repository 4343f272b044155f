"""Advantages and the GRPO loss from log-probs, against float64 truth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import BF16, F32, F64, assert_as_good

from r1kern import ops
from r1kern.kernels import reference

wild = settings(max_examples=60, deadline=None)


def test_group_advantage_by_hand():
    rewards = torch.tensor([1.0, 5.0, 0.0, 0.0, 7.0, 3.0, 3.0, 1.0], dtype=F64)
    ids = torch.tensor([9, -2, 9, 9, 4, -2, -2, 9])
    # group 9: 1 0 0 1 (mean 1/2, std 1/2); group -2: 5 3 3 (mean 11/3, variance 8/9); 4 is alone
    s = math.sqrt(8 / 9)
    expected = [1, 4 / 3 / s, -1, -1, 0, -2 / 3 / s, -2 / 3 / s, 1]
    got = ops.group_advantage(rewards, ids, eps=0.0)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64))
    none = ops.group_advantage(rewards, ids, std="none")
    expected = [0.5, 4 / 3, -0.5, -0.5, 0, -2 / 3, -2 / 3, 0.5]
    torch.testing.assert_close(none, torch.tensor(expected, dtype=F64))
    sample = ops.group_advantage(rewards[[0, 2]], ids[[0, 2]], std="sample", eps=0.0)
    torch.testing.assert_close(sample, torch.tensor([1, -1], dtype=F64) / math.sqrt(2))


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_group_advantage_against_reference(std, dtype):
    torch.manual_seed(0)
    ids = torch.randint(-5, 9, (200,)) * 1_000_003
    rewards = (torch.randn(200) + 100).to(dtype)
    truth = reference.group_advantage(rewards.double(), ids, std=std)
    plain = reference.group_advantage(rewards, ids, std=std)
    got = ops.group_advantage(rewards, ids, std=std)
    assert got.dtype == dtype
    assert_as_good([got], [plain], [truth])


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("reward", [0.1, 1e-30, -1e30, 0.0])
def test_equal_rewards_have_no_advantage(std, eps, dtype, reward):
    rewards = torch.full((8,), reward, dtype=dtype)  # 7 x 0.1 / 7 is not 0.1
    ids = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    assert torch.equal(
        ops.group_advantage(rewards, ids, std=std, eps=eps), torch.zeros_like(rewards)
    )


def test_group_advantage_of_nothing():
    assert ops.group_advantage(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_ungraded_reward_is_refused(bad):
    with pytest.raises(ValueError, match=r"rewards\[2\] is -?(nan|inf)"):
        ops.group_advantage(torch.tensor([1.0, 2.0, bad]), torch.tensor([0, 0, 1]))


rewards_in_groups = st.lists(
    st.tuples(st.floats(-100, 100, width=32), st.integers(-3, 3)), min_size=1, max_size=30
)


@wild
@given(
    rewards_in_groups, st.randoms(use_true_random=False), st.sampled_from(["population", "sample"])
)
def test_advantages_ignore_order_shift_and_scale(pairs, random, std):
    rewards = torch.tensor([r for r, _ in pairs], dtype=F64)
    ids = torch.tensor([g for _, g in pairs])
    base = ops.group_advantage(rewards, ids, std=std)
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = ops.group_advantage(rewards[order], ids[order], std=std)
    torch.testing.assert_close(shuffled, base[order], rtol=1e-9, atol=1e-9)
    renamed = ops.group_advantage(rewards, ids * -7 + 2, std=std)
    torch.testing.assert_close(renamed, base, rtol=1e-9, atol=1e-9)
    shifted = ops.group_advantage(rewards + 64.0, ids, std=std)
    torch.testing.assert_close(shifted, base, rtol=1e-6, atol=1e-6)
    scaled = ops.group_advantage(rewards * 8.0, ids, std=std, eps=8e-6)
    torch.testing.assert_close(scaled, base, rtol=1e-9, atol=1e-9)
    for g in ids.unique():
        assert abs(base[ids == g].sum()) < 1e-6


# ---------------------------------------------------------------------------------- grpo_loss


def grpo_inputs(B=5, S=9, dtype=F64, seed=0):
    """Log-probs a clip apart from each other, ragged lengths, one empty completion."""
    torch.manual_seed(seed)
    old = -torch.rand(B, S, dtype=dtype) * 3
    logp = old + 0.4 * torch.randn(B, S, dtype=dtype)
    ref = old + 0.4 * torch.randn(B, S, dtype=dtype)
    lengths = torch.randint(1, S + 1, (B,))
    lengths[1] = 0
    mask = (torch.arange(S) < lengths[:, None]).to(dtype)
    return logp.requires_grad_(), old, ref, torch.randn(B, dtype=dtype), mask


OBJECTIVES = {
    "paper": {},
    "dapo": {"normalizer": "token", "clip_high": 0.28},
    "dr_grpo": {"normalizer": "constant", "max_tokens": 32},
    "gspo": {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.1},
    "gspo by token": {"ratio": "sequence", "normalizer": "token", "beta": 0.3},
    "equation (1) to the letter": {"ratio": "completion", "clip_high": 0.4},
    "kl": {"beta": 0.5, "clip_low": 0.1},
    "share of a batch": {"num_sequences": 64, "num_tokens": 900, "normalizer": "token"},
    "share of sequences": {"num_sequences": 64, "num_tokens": 900},
    "no kl": {"beta": 0.0},
}


def test_grpo_loss_by_hand():
    """Two completions of 2 and 1 tokens: equation (1) on paper."""
    old = torch.tensor([[-1.0, -1.0], [-2.0, 0.0]], dtype=F64)
    rho = torch.tensor([[1.5, 0.5], [0.5, 1.0]], dtype=F64)
    logp = (old + rho.log()).requires_grad_()
    ref = logp.detach() + torch.tensor([[2.0, 1.0], [0.5, 9.0]], dtype=F64).log()
    A, mask = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([[1, 1], [1, 0]])
    loss, metrics = ops.grpo_loss(logp, old, ref, A, mask, beta=0.1)
    k3 = [2 - math.log(2) - 1, 0.0, 0.5 - math.log(0.5) - 1]
    # A > 0: min(1.5, 1.2) and min(0.5, 0.8); A = -2: min(-1, 0.8 * -2)
    J = (1.2 - 0.1 * k3[0] + 0.5 - 0.1 * k3[1]) / 2 / 2 + (-1.6 - 0.1 * k3[2]) / 1 / 2
    assert loss.item() == pytest.approx(-J, abs=1e-14)
    assert metrics["kl"].item() == pytest.approx(sum(k3) / 3, abs=1e-14)
    assert metrics["ratio"].item() == pytest.approx(2.5 / 3, abs=1e-14)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)
    assert metrics["clip_low_fraction"].item() == pytest.approx(1 / 3)
    assert metrics["clip_high_fraction"].item() == pytest.approx(1 / 3)
    loss.backward()
    # d(-k3)/dlogp = ref/pi - 1; the clipped tokens keep the KL's gradient only
    dJ = [[0.1 * 1.0 / 4, (0.5 + 0.0) / 4], [0.1 * (0.5 - 1) / 2, 0.0]]
    torch.testing.assert_close(logp.grad, -torch.tensor(dJ, dtype=F64), atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_grpo_loss_against_reference(options, dtype):
    inputs = [x.detach().to(dtype) for x in grpo_inputs()]
    wide = [x.to(torch.promote_types(dtype, F32)) for x in inputs]
    results = {}
    for name, function, given_ in (
        ("got", ops.grpo_loss, inputs),
        ("plain", reference.grpo_loss, wide),
        ("truth", reference.grpo_loss, [x.double() for x in inputs]),
    ):
        logp = given_[0].requires_grad_()
        loss, metrics = function(*given_, **options)
        (grad,) = torch.autograd.grad(loss, logp)
        assert not any(m.requires_grad for m in metrics.values())
        results[name] = [loss.detach(), *(metrics[k] for k in sorted(metrics)), grad]
        assert loss.dtype == wide[0].dtype if name == "got" else True
    assert_as_good(results["got"], results["plain"], results["truth"])


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_nothing_under_the_mask_is_seen(options):
    logp, old, ref, A, mask = grpo_inputs()
    weights = torch.rand_like(old) + 0.5
    loss, metrics = ops.grpo_loss(logp, old, ref, A, mask, importance_weights=weights, **options)
    (grad,) = torch.autograd.grad(loss, logp)
    for poison in (math.nan, math.inf, -math.inf):
        hidden = [torch.where(mask > 0, x.detach(), poison) for x in (logp, old, ref, weights)]
        hidden[0].requires_grad_()
        A_poisoned = torch.where(mask.any(1), A, poison)
        loss_p, metrics_p = ops.grpo_loss(
            *hidden[:3], A_poisoned, mask, importance_weights=hidden[3], **options
        )
        (grad_p,) = torch.autograd.grad(loss_p, hidden[0])
        assert torch.equal(loss_p, loss) and torch.equal(grad_p, grad)
        assert all(torch.equal(metrics_p[k], metrics[k]) for k in metrics)
    assert torch.all(grad[mask == 0] == 0) and grad.isfinite().all()


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_micro_batches_add_up(options):
    logp, old, ref, A, mask = grpo_inputs(B=7)
    options = {"num_sequences": 7, "num_tokens": mask.sum(), **options}
    whole, metrics = ops.grpo_loss(logp, old, ref, A, mask, **options)
    (grad,) = torch.autograd.grad(whole, logp)
    parts = [
        ops.grpo_loss(logp[i], old[i], ref[i], A[i], mask[i], **options)
        for i in (slice(0, 1), slice(1, 2), slice(2, 7))
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(p[0] for p in parts), logp)[0], grad)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), value)


def test_an_empty_completion_counts_as_a_sequence():
    logp, old, ref, A, mask = grpo_inputs()
    kept = [0, 2, 3, 4]
    with_empty = ops.grpo_loss(logp, old, ref, A, mask)[0]
    without = ops.grpo_loss(logp[kept], old[kept], ref[kept], A[kept], mask[kept])[0]
    torch.testing.assert_close(with_empty, without * 4 / 5)


@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)])
@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_batch_without_tokens_is_zero(options, shape):
    logp = torch.randn(shape, requires_grad=True)
    x = torch.randn(shape)
    loss, metrics = ops.grpo_loss(logp, x, x, torch.randn(shape[0]), torch.zeros(shape), **options)
    loss.backward()
    assert loss == 0 and not logp.grad.any() and not any(m.any() for m in metrics.values())


def test_on_policy_log_probs_serve_as_old_and_reference():
    """The same tensor thrice: old and reference are constants, the gradient is the policy's."""
    logp, _, _, A, mask = grpo_inputs()
    loss, _ = ops.grpo_loss(logp, logp, logp, A, mask)
    loss.backward()
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(logp.grad, -A[:, None] * mask / lengths / len(A))


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_only_the_policy_has_a_gradient(options):
    logp, *constants, mask = grpo_inputs()
    weights = torch.rand_like(mask)
    constants = [x.requires_grad_() for x in (*constants, weights)]
    loss, _ = ops.grpo_loss(logp, *constants[:3], mask, importance_weights=weights, **options)
    assert torch.autograd.grad(loss, constants, allow_unused=True) == (None,) * 4


def test_no_reference_is_needed_without_kl():
    logp, old, ref, A, mask = grpo_inputs()
    with_ref = ops.grpo_loss(logp, old, ref, A, mask, beta=0.0)
    without, metrics = ops.grpo_loss(logp, old, None, A, mask, beta=0.0)
    assert torch.equal(with_ref[0], without) and "kl" not in metrics
    with pytest.raises(ValueError, match="ref_logp is missing"):
        ops.grpo_loss(logp, old, None, A, mask)


def test_importance_weights_multiply_the_policy_term_only():
    logp, old, ref, A, mask = grpo_inputs()
    weights = torch.rand_like(old)
    got = ops.grpo_loss(logp, old, ref, A, mask, beta=0.5, importance_weights=weights)[0]
    truth = reference.grpo_loss(logp, old, ref, A, mask, beta=0.5, importance_weights=weights)[0]
    torch.testing.assert_close(got, truth)
    none = ops.grpo_loss(
        logp, old, ref, A, mask, beta=0.5, importance_weights=torch.zeros_like(old)
    )[0]
    only_kl = ops.grpo_loss(logp, old, ref, torch.zeros_like(A), mask, beta=0.5)[0]
    torch.testing.assert_close(none, only_kl)


log_prob = st.floats(-20, 0, width=32)


@wild
@given(st.data(), st.sampled_from(sorted(OBJECTIVES)))
def test_grpo_loss_of_wild_inputs(data, name):
    B, S = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    table = st.lists(st.lists(log_prob, min_size=S, max_size=S), min_size=B, max_size=B)
    logp, old, ref = (torch.tensor(data.draw(table), dtype=F64) for _ in range(3))
    A = torch.tensor(data.draw(st.lists(st.floats(-5, 5), min_size=B, max_size=B)), dtype=F64)
    bits = st.lists(st.booleans(), min_size=B * S, max_size=B * S)
    mask = torch.tensor(data.draw(bits)).view(B, S)
    got, truth = [], []
    for function, out in ((ops.grpo_loss, got), (reference.grpo_loss, truth)):
        leaf = logp.clone().requires_grad_()
        loss, metrics = function(leaf, old, ref, A, mask, **OBJECTIVES[name])
        out += [loss, torch.autograd.grad(loss, leaf)[0], *(metrics[k] for k in sorted(metrics))]
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12)
