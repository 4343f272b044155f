"""Every fused op against float64 truth: forward, gradient, ragged, empty, poisoned, two ranks."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from r1kern import ops
from r1kern.kernels import linear_logprob as head
from r1kern.kernels import reference
from r1kern.kernels import route as router

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
wild = settings(max_examples=60, deadline=None)


def rms(x):
    return x.double().square().mean().sqrt()


def assert_as_good(got, plain, truth):
    """`got` is at most 3 times as far from the float64 truth as plain torch of the same dtype is,
    give or take 8 last places (1000 in float64, where the truth has an error of its own)."""
    for x, p, t in zip(got, plain, truth, strict=True):
        assert x.shape == t.shape
        if t.numel():
            slack = torch.finfo(x.dtype).eps * rms(t) * (1000 if x.dtype == F64 else 8)
            error, allowed = rms(x - t), 3 * rms(p - t) + slack
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture
def poisoned():
    """Every uninitialised allocation is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------- group_advantage


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


# ----------------------------------------------------------------------------- linear_logprob


def head_inputs(T=23, H=16, V=37, dtype=F32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(T, H), torch.randn(V, H) * 0.7
    targets = torch.randint(V, (T,))
    if T > 1:
        targets[:2] = torch.tensor([0, V - 1])
    return hidden.to(dtype), weight.to(dtype), targets


def head_results(function, hidden, weight, targets, which=("logp", "entropy"), **options):
    """Log-probs, entropies, and gradients of a random combination of those named in `which`."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    out = function(hidden, weight, targets, **options)
    g = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1), dtype=F64)
    used = [o for o, name in zip(out, ("logp", "entropy"), strict=True) if name in which]
    scalar = sum((o * w.to(o.dtype)).sum() for o, w in zip(used, g, strict=False))
    return [x.detach() for x in (*out, *torch.autograd.grad(scalar, (hidden, weight)))]


def assert_head(hidden, weight, targets, **options):
    got = head_results(ops.linear_logprob, hidden, weight, targets, **options)
    plain = head_results(reference.linear_logprob, hidden, weight, targets, **options)
    truth = head_results(
        reference.linear_logprob, hidden.double(), weight.double(), targets, **options
    )
    assert got[0].dtype == got[1].dtype == torch.promote_types(hidden.dtype, F32)
    assert got[2].dtype == got[3].dtype == hidden.dtype
    assert_as_good(got, plain, truth)
    return got


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("which", [("logp",), ("entropy",), ("logp", "entropy")], ids="+".join)
@pytest.mark.parametrize("chunk_rows", [None, 5, 1])
def test_linear_logprob(monkeypatch, poisoned, dtype, temperature, which, chunk_rows):
    hidden, weight, targets = head_inputs(dtype=dtype)
    if chunk_rows:
        row_bytes = len(weight) * (2 * max(4, dtype.itemsize) + dtype.itemsize)
        monkeypatch.setattr(head, "LOGITS_BYTES", chunk_rows * row_bytes)
        assert len(list(head._logits(hidden, weight, 1.0))) == math.ceil(len(hidden) / chunk_rows)
    assert_head(hidden, weight, targets, temperature=temperature, which=which)


def test_linear_logprob_by_hand():
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=F64)
    hidden, targets = torch.ones(2, 1, dtype=F64), torch.tensor([2, 0])
    logp, entropy = ops.linear_logprob(hidden, weight, targets)
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=F64)
    torch.testing.assert_close(logp, p[[2, 0]].log())
    torch.testing.assert_close(entropy, -(p * p.log()).sum().expand(2))


def test_logits_stay_within_their_budget():
    """At DeepSeek-V3's vocabulary, buffers included, whatever T is."""
    with FakeTensorMode():
        hidden = torch.empty(32_768, 64, dtype=BF16)
        weight = torch.empty(129_280, 64, dtype=BF16)
        chunks = list(head._logits(hidden, weight, 1.0))
    sizes = [rows.stop - rows.start for rows, _, _ in chunks]
    assert sum(sizes) == 32_768 and max(sizes) > 1
    assert max(sizes) * 129_280 * (4 + 4 + 2) <= head.LOGITS_BYTES == 256 * 2**20


def test_linear_logprob_of_large_logits_and_strided_inputs():
    hidden, weight, targets = head_inputs(T=40, H=12)
    got = assert_head(hidden[::2].mul(60), weight.t().contiguous().t(), targets[::2])
    assert all(x.isfinite().all() for x in got)
    assert_head(hidden.t().contiguous().t(), weight[::3], targets % 13)


@pytest.mark.parametrize("V", [1, 517])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_linear_logprob_of_few_rows(T, V):
    assert_head(*head_inputs(T=T, V=V))


def test_linear_logprob_repeats_bitwise():
    inputs = head_inputs(T=300)
    once = head_results(ops.linear_logprob, *inputs)
    assert all(map(torch.equal, once, head_results(ops.linear_logprob, *inputs)))


SHARDS = (260, 257)
EDGES = (0, 259, 260, 516)
DEADLINE = timedelta(seconds=180)


def vocab_parallel_rank(rank, rendezvous):
    """One of two ranks: ragged shards, chunks of different sizes, targets at the shards' edges."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=DEADLINE
    )
    try:
        group = dist.new_group([0, 1], timeout=DEADLINE)
        for dtype in (F32, F64, BF16):
            hidden, weight, targets = head_inputs(T=31, V=sum(SHARDS), dtype=dtype)
            targets[: len(EDGES)] = torch.tensor(EDGES)
            weight[SHARDS[0] :, 0] += 8  # of two tokens one shard holds all the probability
            hidden[:2, 0] = torch.tensor([16.0, -16.0])
            head.LOGITS_BYTES = (4 + 3 * rank) * SHARDS[rank] * 12
            shard = weight.split(SHARDS)[rank].clone()
            logp, entropy, partial, shard_grad = head_results(
                ops.linear_logprob, hidden, shard, targets, temperature=0.8, tp_group=group
            )
            everyone = torch.empty(2, 2, len(hidden), dtype=logp.dtype)
            dist.all_gather(list(everyone), torch.stack([logp, entropy]))
            assert torch.equal(everyone[0], everyone[1])
            dist.all_reduce(partial)
            plain = head_results(reference.linear_logprob, hidden, weight, targets, temperature=0.8)
            truth = head_results(
                reference.linear_logprob, hidden.double(), weight.double(), targets, temperature=0.8
            )
            for results in (plain, truth):
                results[3] = results[3].split(SHARDS)[rank]
            assert_as_good([logp, entropy, partial, shard_grad], plain, truth)
        nothing = ops.linear_logprob(hidden[:0], shard, targets[:0], tp_group=group)
        assert nothing[0].shape == nothing[1].shape == (0,)
        with pytest.raises(ValueError, match=r"targets must be in \[0, 517\), found 517 to 517"):
            ops.linear_logprob(hidden[:1], shard, torch.tensor([517]), tp_group=group)
        with pytest.raises(ValueError, match=r"disagree about T: \[5, 6\]"):
            ops.linear_logprob(hidden[: 5 + rank], shard, targets[: 5 + rank], tp_group=group)
        with pytest.raises(
            ValueError, match=r"no rows on a rank of tp_group: shards are \[260, 0\]"
        ):
            ops.linear_logprob(hidden, shard if rank == 0 else shard[:0], targets, tp_group=group)
    finally:
        dist.destroy_process_group()


def test_vocab_parallel_on_two_ranks(tmp_path):
    mp.spawn(vocab_parallel_rank, (f"file://{tmp_path}/rendezvous",), nprocs=2)


# -------------------------------------------------------------------------------------- route

V3 = {"num_groups": 8, "topk_groups": 4, "topk": 8, "scale": 2.5}
LAYOUTS = {
    "deepseek-v3": (256, V3),
    "tiny": (8, {"num_groups": 2, "topk_groups": 1, "topk": 2}),
    "one group": (7, {"num_groups": 1, "topk_groups": 1, "topk": 3, "scale": 0.5}),
    "raw weights": (12, {"num_groups": 3, "topk_groups": 2, "topk": 4, "normalize": False}),
    "every group": (6, {"num_groups": 6, "topk_groups": 6, "topk": 6}),
}


def route_inputs(T, E, dtype=F32):
    torch.manual_seed(0)
    return torch.randn(T, E).to(dtype), torch.randn(E) * 0.3


def route_results(function, logits, bias, **layout):
    logits = logits.detach().requires_grad_()
    indices, weights, counts = function(logits, bias, **layout)
    g = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    (grad,) = torch.autograd.grad((weights * g.to(weights.dtype)).sum(), logits)
    return indices, counts, [weights.detach(), grad]


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("T", [0, 1, 50])
@pytest.mark.parametrize(("E", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_route_against_reference(poisoned, E, layout, T, dtype):
    logits, bias = route_inputs(T, E, dtype)
    indices, counts, got = route_results(ops.route, logits, bias, **layout)
    _, _, plain = route_results(reference.route, logits, bias, **layout)
    expected, expected_counts, truth = route_results(
        reference.route, logits.double(), bias.double(), **layout
    )
    assert torch.equal(indices, expected) and torch.equal(counts, expected_counts)
    assert got[0].dtype == torch.promote_types(dtype, F32) and got[1].dtype == dtype
    assert counts.dtype == indices.dtype == torch.int64
    assert_as_good(got, plain, truth)


@pytest.mark.parametrize(("E", "layout"), list(LAYOUTS.values())[:4], ids=list(LAYOUTS)[:4])
def test_route_against_transformers(E, layout):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=E,
        n_group=layout["num_groups"],
        topk_group=layout["topk_groups"],
        num_experts_per_tok=layout["topk"],
        routed_scaling_factor=layout.get("scale", 1.0),
        norm_topk_prob=layout.get("normalize", True),
    )
    router = DeepseekV3TopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    for centre in (0.0, -5.0, 5.0):  # a mask of 0 in place of -inf would show at -5
        router.e_score_correction_bias.normal_(centre, 0.3)
        hidden = torch.randn(64, 16)
        logits, weights, experts = router(hidden)
        got = ops.route(logits, router.e_score_correction_bias, **layout)
        order = experts.argsort(1)
        mine = got.indices.argsort(1)
        assert torch.equal(got.indices.gather(1, mine), experts.gather(1, order))
        assert torch.equal(got.counts, torch.bincount(experts.flatten(), minlength=E))
        torch.testing.assert_close(got.weights.gather(1, mine), weights.gather(1, order))
        g = torch.randn(64, E)
        grads = [
            torch.autograd.grad((w * g.gather(1, i)).sum(), logits, retain_graph=True)[0]
            for w, i in ((got.weights, got.indices), (weights, experts))
        ]
        torch.testing.assert_close(*grads)


def test_route_by_hand():
    p = torch.tensor([[0.5, 0.4, 0.6, 0.1]], dtype=F64)
    layout = {"num_groups": 2, "topk_groups": 1, "topk": 2, "scale": 3.0}
    got = ops.route(p.logit(), torch.zeros(4), **layout)  # groups score 0.9 and 0.7
    assert got.indices.tolist() == [[0, 1]] and got.counts.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(got.weights, torch.tensor([[3 * 5 / 9, 3 * 4 / 9]], dtype=F64))
    got = ops.route(p.logit(), torch.tensor([0.0, 0, 0, 0.7]), **layout)  # 0.9 and 0.6 + 0.8
    assert got.indices.tolist() == [[3, 2]]
    torch.testing.assert_close(got.weights, torch.tensor([[3 * 1 / 7, 3 * 6 / 7]], dtype=F64))


def test_of_equal_experts_the_lowest_index_wins():
    got = ops.route(torch.zeros(3, 64), torch.zeros(64), **V3 | {"topk": 20})
    assert torch.equal(got.indices, torch.arange(20).expand(3, 20))
    bias = torch.zeros(64)
    bias[40:] = 1.0
    got = ops.route(torch.zeros(3, 64), bias, num_groups=8, topk_groups=4, topk=26)
    assert torch.equal(
        got.indices, torch.cat([torch.arange(40, 64), torch.tensor([0, 1])]).expand(3, -1)
    )


def test_the_bias_never_touches_the_weights():
    """(score + bias) - bias in float32 would lose small scores altogether."""
    logits, _ = route_inputs(20, 8)
    logits -= 18
    for bias in (torch.full((8,), 1e4), torch.full((8,), -1e4)):
        got = ops.route(logits, bias, num_groups=1, topk_groups=1, topk=3, normalize=False)
        assert torch.equal(got.weights, logits.sigmoid().gather(1, got.indices))


def test_route_of_strided_logits():
    logits, bias = route_inputs(40, 16)
    layout = {"num_groups": 4, "topk_groups": 2, "topk": 3}
    for strided in (
        logits[::2],
        logits.t().contiguous().t(),
        torch.cat([logits, logits], 1)[:, :16],
    ):
        indices, counts, got = route_results(ops.route, strided, bias, **layout)
        expected = route_results(ops.route, strided.contiguous(), bias, **layout)
        assert torch.equal(indices, expected[0]) and torch.equal(counts, expected[1])
        torch.testing.assert_close(got, expected[2])


# ------------------------------------------------------------- registration, fakes and refusals


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(dtype):
    hidden, weight, targets = head_inputs(T=6, dtype=dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    opcheck(head.linear_logprob, (*leaves, targets, 0.7, None))
    outputs = head.linear_logprob(*leaves, targets, 0.7, None)
    assert [x.requires_grad for x in outputs] == [True, True, False, False, False]
    opcheck(head.linear_logprob, (hidden.t().contiguous().t(), weight, targets, 0.7, None))
    wide = torch.promote_types(dtype, F32)
    rows = torch.rand(6, dtype=wide)
    for g, h in ((rows, None), (None, rows), (rows, rows)):
        arguments = (hidden.detach(), weight.detach(), targets, rows, rows, rows + 9, g, h, 0.7)
        opcheck(head.linear_logprob_backward, arguments)
    logits, bias = route_inputs(6, 8, dtype)
    opcheck(router.route, (logits.requires_grad_(), bias, 2, 1, 2, 1.5, True))
    indices = torch.tensor([[0, 3]] * 6)
    opcheck(
        router.route_backward, (logits.detach(), indices, torch.rand(6, 2, dtype=wide), 1.5, True)
    )
    if dtype == F32:
        arguments = (torch.rand(5), torch.tensor([0, 0, 1, 1, 1]), "population", 1e-6)
        opcheck(ops._group_advantage, arguments)


def test_ops_run_on_fake_tensors_of_the_671b_model():
    with FakeTensorMode():
        hidden = torch.empty(8192, 7168, dtype=BF16, requires_grad=True)
        weight = torch.empty(129_280, 7168, dtype=BF16, requires_grad=True)
        logp, entropy = ops.linear_logprob(hidden, weight, torch.empty(8192, dtype=torch.int64))
        assert logp.shape == entropy.shape == (8192,) and logp.dtype == F32
        advantages = ops.group_advantage(torch.empty(8), torch.empty(8, dtype=torch.int64))
        rows = logp.view(8, 1024)
        loss, _ = ops.grpo_loss(rows, rows, rows, advantages, torch.ones(8, 1024))
        (loss + entropy.sum()).backward()
        assert hidden.grad.dtype == weight.grad.dtype == BF16
        logits = torch.empty(8192, 256, requires_grad=True)
        routing = ops.route(logits, torch.empty(256), **V3)
        assert routing.indices.shape == routing.weights.shape == (8192, 8)
        assert routing.counts.shape == (256,)
        routing.weights.sum().backward()
        assert logits.grad.shape == logits.shape


x, ids, h, w = torch.rand(3, 4), torch.tensor([0, 1, 2]), torch.rand(3, 4), torch.rand(5, 4)
REFUSALS = {
    "advantage std": (lambda: ops.group_advantage(x[:, 0], ids, std="var"), "std must be one of"),
    "advantage shape": (
        lambda: ops.group_advantage(x, ids),
        r"rewards must be a float tensor \[N\]",
    ),
    "advantage ints": (lambda: ops.group_advantage(ids, ids), "rewards must be a float tensor"),
    "group ids": (
        lambda: ops.group_advantage(x[:, 0], x[:, 0]),
        r"group_ids must be integers \[3\]",
    ),
    "group length": (
        lambda: ops.group_advantage(x[:, 0], ids[:2]),
        r"group_ids must be integers \[3\]",
    ),
    "normalizer": (
        lambda: ops.grpo_loss(x, x, x, x[:, 0], x, normalizer="mean"),
        "normalizer must be one of sequence, token, constant, got 'mean'",
    ),
    "ratio": (lambda: ops.grpo_loss(x, x, x, x[:, 0], x, ratio="product"), "ratio must be one of"),
    "logp": (lambda: ops.grpo_loss(ids, x, x, x[:, 0], x), r"logp must be a float tensor \[B, S\]"),
    "old": (lambda: ops.grpo_loss(x, x[:, :2], x, x[:, 0], x), r"old_logp must be \[3, 4\]"),
    "mask": (lambda: ops.grpo_loss(x, x, x, x[:, 0], x[:2]), r"mask must be \[3, 4\]"),
    "advantages": (lambda: ops.grpo_loss(x, x, x, x[0], x), r"advantages must be \[3\]"),
    "loss device": (
        lambda: ops.grpo_loss(x, x, x.to("meta"), x[:, 0], x),
        "one device, got .*'ref_logp': 'meta'",
    ),
    "max_tokens": (
        lambda: ops.grpo_loss(x, x, x, x[:, 0], x, normalizer="constant"),
        "needs max_tokens",
    ),
    "clip": (
        lambda: ops.grpo_loss(x, x, x, x[:, 0], x, clip_low=1.5),
        r"clip_low must be in \[0, 1\]",
    ),
    "hidden": (lambda: ops.linear_logprob(h[0], w, ids), "hidden must be a float tensor"),
    "weight shape": (lambda: ops.linear_logprob(h, w[:, :3], ids), r"weight must be .*\[V, 4\]"),
    "weight dtype": (
        lambda: ops.linear_logprob(h, w.double(), ids),
        "weight must be torch.float32",
    ),
    "targets dtype": (
        lambda: ops.linear_logprob(h, w, ids.int()),
        r"targets must be torch.int64 \[3\]",
    ),
    "targets shape": (
        lambda: ops.linear_logprob(h, w, ids[:2]),
        r"targets must be torch.int64 \[3\]",
    ),
    "targets high": (lambda: ops.linear_logprob(h, w, ids + 3), r"in \[0, 5\), found 3 to 5"),
    "targets low": (lambda: ops.linear_logprob(h, w, ids - 100), r"in \[0, 5\), found -100 to -98"),
    "device": (lambda: ops.linear_logprob(h, w.to("meta"), ids), "tensors must be on one device"),
    "temperature": (
        lambda: ops.linear_logprob(h, w, ids, temperature=0.0),
        "temperature must be above",
    ),
    "no vocabulary": (lambda: ops.linear_logprob(h, w[:0], ids), "weight has no rows"),
    "logits": (
        lambda: ops.route(x[0], x[0], num_groups=1, topk_groups=1, topk=1),
        "logits must be",
    ),
    "bias": (
        lambda: ops.route(x, x[:, 0], num_groups=1, topk_groups=1, topk=1),
        r"bias must be \[4\]",
    ),
    "groups": (
        lambda: ops.route(x, x[0], num_groups=3, topk_groups=1, topk=1),
        "num_groups must divide the 4 experts, got 3",
    ),
    "topk_groups": (
        lambda: ops.route(x, x[0], num_groups=2, topk_groups=3, topk=1),
        r"topk_groups must be in 1..2 \(num_groups\), got 3",
    ),
    "group size": (
        lambda: ops.route(x, x[0], num_groups=4, topk_groups=1, topk=1),
        "at least 2 of 4 experts a group",
    ),
    "topk": (
        lambda: ops.route(x, x[0], num_groups=2, topk_groups=1, topk=3),
        "topk must be in 1..2",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
