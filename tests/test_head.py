"""The LM-head ops against float64 truth: forward, gradients, chunks, compaction."""

import math

import pytest
import torch
from truth import BF16, F32, F64, assert_as_good, head_inputs

from r1kern import ops
from r1kern.kernels import head, reference


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


def cut(monkeypatch, hidden, weight, rows):
    """Makes the ops take `rows` rows at a time."""
    wide = head.accumulator(hidden)
    copies = wide.itemsize + (hidden.dtype.itemsize if hidden.dtype != wide else 0)
    monkeypatch.setitem(head.LOGITS_BYTES, "cpu", rows * len(weight) * copies)
    made = list(head.chunks(hidden, weight, keep=True))
    assert len(made) == math.ceil(len(hidden) / rows)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("which", [("logp",), ("entropy",), ("logp", "entropy")], ids="+".join)
@pytest.mark.parametrize("chunk_rows", [None, 5, 1])
def test_linear_logprob(monkeypatch, poisoned, dtype, temperature, which, chunk_rows):
    hidden, weight, targets = head_inputs(dtype=dtype)
    if chunk_rows:
        cut(monkeypatch, hidden, weight, chunk_rows)
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
    for V in (129_280, 16_160):
        hidden, weight = torch.empty(32_768, 64, dtype=BF16), torch.empty(V, 64, dtype=BF16)
        chunks = list(head.chunks(hidden, weight, keep=True, widest=V))
        sizes = [rows.stop - rows.start for rows, _ in chunks]
        assert sum(sizes) == 32_768 and max(sizes) > 1
        assert max(sizes) * V * (4 + 2) <= head.LOGITS_BYTES["cpu"] == 96 * 2**20
        assert all(z.shape == (n, V) for (_, z), n in zip(chunks, sizes, strict=True))


def test_rows_that_fit_at_once_are_one_chunk():
    hidden, weight = torch.empty(300, 8), torch.empty(50, 8)
    assert [rows for rows, _ in head.chunks(hidden, weight, keep=True)] == [slice(0, 300)]


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


# --------------------------------------------------------------------------- linear_grpo_loss

SEQUENCES = torch.tensor([0, 2, 2, 1, 2, 0, 4, 4, 2, 4, 4, 5, 5, 5, 5, 2, 1, 0, 0, 4, 2, 2, 2])
ADVANTAGES = [1.5, -0.7, 0.0, 2.0, -1.2, 0.3]  # sequence 3 is empty


def loss_inputs(dtype=F32, T=23):
    """Log-probs near the policy's own: some rows are clipped, some not."""
    hidden, weight, targets = head_inputs(T=T, dtype=dtype)
    own, _ = reference.linear_logprob(hidden.double(), weight.double(), targets, temperature=0.8)
    torch.manual_seed(7)
    old, ref, sampled = (own + 0.3 * torch.randn(T, dtype=F64) for _ in range(3))
    sequences = SEQUENCES[torch.arange(T) % len(SEQUENCES)]
    return (hidden, weight, targets), (old, ref, sampled), torch.tensor(ADVANTAGES), sequences


def loss_results(function, leaves, logps, advantages, sequences, **options):
    hidden, weight, targets = leaves
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    old, ref, sampled = (x.to(head.accumulator(hidden)) for x in logps)
    if options.pop("on_policy", False):
        old = None
    if options.get("beta") == 0:
        ref = None
    if "importance_cap" in options:
        options["sampled_logp"] = sampled
    advantages = advantages.to(hidden.dtype if hidden.dtype == F64 else F32)
    loss, metrics = function(hidden, weight, targets, old, ref, advantages, sequences, **options)
    grads = torch.autograd.grad(loss, (hidden, weight))
    return [loss.detach(), *grads, *(metrics[name].double() for name in sorted(metrics))]


def assert_scalars(got, truth, dtype):
    """Loss and metrics: sums of terms of both signs."""
    rtol, atol = {F32: (1e-5, 1e-6), F64: (1e-12, 1e-12), BF16: (0.05, 0.05)}[dtype]
    for x, t in zip((got[0], *got[3:]), (truth[0], *truth[3:]), strict=True):
        torch.testing.assert_close(x.double(), t.double(), rtol=rtol, atol=atol)


LOSSES = {
    "paper": {},
    "on policy": {"on_policy": True},
    "no kl": {"beta": 0.0},
    "no kl, on policy, dapo": {"beta": 0.0, "on_policy": True, "normalizer": "token"},
    "tight clip": {"beta": 0.0, "clip_low": 0.05, "clip_high": 0.01},
    "dr_grpo": {"normalizer": "constant", "max_tokens": 32, "beta": 0.2},
    "unbiased kl": {"beta": 0.4, "kl": "k3_unbiased"},
    "k2": {"beta": 0.4, "kl": "k2"},
    "entropy": {"entropy_coef": 0.2, "beta": 0.0},
    "all of it": {"entropy_coef": -0.1, "beta": 0.1, "importance_cap": 1.1, "clip_high": 0.28},
    "share of a batch": {"num_sequences": 64, "num_tokens": 900, "normalizer": "token"},
}


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("chunk_rows", [None, 5, 1])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_linear_grpo_loss(monkeypatch, poisoned, dtype, chunk_rows, options):
    leaves, *rest = loss_inputs(dtype)
    options = {"temperature": 0.8} | options
    if chunk_rows:
        cut(monkeypatch, *leaves[:2], chunk_rows)
    got = loss_results(ops.linear_grpo_loss, leaves, *rest, **options)
    plain = loss_results(reference.linear_grpo_loss, leaves, *rest, **options)
    wide = [x.double() if x.is_floating_point() else x for x in leaves]
    truth = loss_results(reference.linear_grpo_loss, wide, *rest, **options)
    assert got[1].dtype == got[2].dtype == dtype and got[0].dtype == head.accumulator(leaves[0])
    if dtype == BF16:
        # A row at the clip's edge falls to one side or the other by its rounding: compare the two
        # roundings of it, not the truth, where a whole row's gradient hangs on it.
        plain_error = (plain[1] - truth[1]).abs().amax(1)
        same = (got[1] - plain[1]).abs().amax(1) <= 3 * plain_error.amax()
        assert same.float().mean() > 0.9
    else:
        assert_as_good(got[1:3], plain[1:3], truth[1:3])
    assert_scalars(got, truth, dtype)


def test_the_head_equals_the_loss_on_a_grid():
    """The two ways to the same number: fused, and log-probs first."""
    leaves, (old, ref, _), advantages, _ = loss_inputs(F64, T=24)
    mask = torch.rand(24) < 0.7
    hidden = leaves[0].clone()
    hidden[~mask] = math.nan
    fused = [x.clone().requires_grad_() for x in (hidden, leaves[1])]
    loss, metrics = ops.linear_grpo_loss(
        *fused, leaves[2], old, ref, advantages.double(), mask=mask, beta=0.3
    )
    loss.backward()
    apart = [x.clone().requires_grad_() for x in leaves[:2]]
    logp, _ = ops.linear_logprob(*apart, leaves[2])
    grid = (x.view(6, 4) for x in (logp, old, ref))
    expected, expected_metrics = ops.grpo_loss(
        *grid, advantages.double(), mask.view(6, 4), beta=0.3
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(metrics[name], value)
    torch.testing.assert_close(fused[0].grad, apart[0].grad)
    torch.testing.assert_close(fused[1].grad, apart[1].grad)


def test_rewards_become_advantages_in_the_prologue():
    leaves, (old, ref, _), _, sequences = loss_inputs(F64)
    rewards, groups = (
        torch.tensor([1.0, 0, 1, 1, 0.5, 0.5]).double(),
        torch.tensor([3, 3, 3, 1, 0, 0]),
    )
    folded, _ = ops.linear_grpo_loss(
        *leaves, old, ref, rewards, sequences, group_ids=groups, advantage_std="sample"
    )
    advantages = ops.group_advantage(rewards, groups, std="sample")
    apart, _ = ops.linear_grpo_loss(*leaves, old, ref, advantages, sequences)
    assert folded == apart


def test_rows_without_a_coefficient_take_no_part(monkeypatch):
    """Clipped rows and rows without advantage are left out of the products, others are not."""
    seen = []
    products = head.add_weight_gradient
    monkeypatch.setattr(
        head, "add_weight_gradient", lambda w, dz, x: seen.append(len(dz)) or products(w, dz, x)
    )
    leaves, (old, ref, _), advantages, sequences = loss_inputs(F64)
    _, metrics = ops.linear_grpo_loss(
        leaves[0].requires_grad_(), *leaves[1:], old, None, advantages, sequences, beta=0.0
    )
    flat = int((advantages[sequences] == 0).sum())
    clipped = round(metrics["clip_fraction"].item() * len(sequences))
    assert clipped > 0 and flat > 0 and seen == [len(sequences) - flat - clipped]
    for extra in ({"ref_logp": ref, "beta": 0.1}, {"ref_logp": None, "entropy_coef": 0.1}):
        seen.clear()
        ops.linear_grpo_loss(
            *leaves, old, advantages=advantages, sequence_ids=sequences, **{"beta": 0.0} | extra
        )
        assert seen == [len(sequences)]


def test_nothing_is_left_where_every_row_is_flat():
    leaves, (old, _, _), advantages, sequences = loss_inputs()
    leaves = [leaves[0].requires_grad_(), leaves[1].requires_grad_(), leaves[2]]
    loss, metrics = ops.linear_grpo_loss(
        *leaves, old.float(), None, advantages * 0, sequences, beta=0.0
    )
    loss.backward()
    assert loss == 0 and metrics["ratio"] > 0
    assert not leaves[0].grad.any() and not leaves[1].grad.any()


def test_micro_batches_of_rows_add_up():
    leaves, (old, ref, _), advantages, sequences = loss_inputs(F64)
    hidden, weight, targets = leaves
    whole = {"num_sequences": 6, "num_tokens": len(targets)}

    def run(pick):
        h, w = hidden[pick].requires_grad_(), weight.clone().requires_grad_()
        kept, ids = sequences[pick].unique(return_inverse=True)
        loss, metrics = ops.linear_grpo_loss(
            h, w, targets[pick], old[pick], ref[pick], advantages.double()[kept], ids, **whole
        )
        loss.backward()
        return [loss.detach(), w.grad, *metrics.values()]

    first = sequences < 3
    parts = zip(run(first), run(~first), strict=True)
    torch.testing.assert_close([a + b for a, b in parts], run(first | ~first))


@pytest.mark.parametrize("ratio", ["sequence", "completion"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_linear_gspo_loss(ratio, dtype):
    options = {"ratio": ratio, "beta": 0.1, "clip_low": 0.05, "clip_high": 0.1}
    leaves, *rest = loss_inputs(dtype)
    options |= {"importance_cap": 1.1, "temperature": 0.8}
    got = loss_results(ops.linear_gspo_loss, leaves, *rest, **options)
    plain = loss_results(reference.linear_grpo_loss, leaves, *rest, **options)
    wide = [x.double() if x.is_floating_point() else x for x in leaves]
    truth = loss_results(reference.linear_grpo_loss, wide, *rest, **options)
    assert_as_good(got[1:3], plain[1:3], truth[1:3])
    assert_scalars(got, truth, dtype)


def test_without_gradients_none_are_made():
    leaves, (old, ref, _), advantages, sequences = loss_inputs()
    rest = (old.float(), ref.float(), advantages, sequences)
    with torch.no_grad():
        quiet, _ = ops.linear_grpo_loss(leaves[0].requires_grad_(), *leaves[1:], *rest)
    assert not quiet.requires_grad
    assert torch.equal(quiet, ops.linear_grpo_loss(*leaves, *rest)[0].detach())


def test_the_backward_scales_and_runs_once():
    leaves, (old, ref, _), advantages, sequences = loss_inputs(F64)
    grads = []
    for scale in (1.0, 3.0):
        w = leaves[1].clone().requires_grad_()
        loss, _ = ops.linear_grpo_loss(
            leaves[0], w, leaves[2], old, ref, advantages.double(), sequences
        )
        (loss * scale).backward(retain_graph=True)
        grads.append(w.grad.clone())
    torch.testing.assert_close(grads[0] * 3, grads[1])
    with pytest.raises(RuntimeError, match="its backward runs once"):
        loss.backward()


def test_more_rows_than_16_bits_count():
    torch.manual_seed(0)
    T = 70_001
    hidden, weight = torch.randn(T, 4, dtype=F64), torch.randn(9, 4, dtype=F64)
    targets, sequences = torch.randint(9, (T,)), torch.randint(3, (T,))
    rest = (None, None, torch.tensor([1.0, -1.0, 0.5]).double(), sequences)
    results = []
    for function in (ops.linear_grpo_loss, reference.linear_grpo_loss):
        w = weight.clone().requires_grad_()
        loss, _ = function(hidden, w, targets, *rest, beta=0.0)
        results.append([loss.detach(), *torch.autograd.grad(loss, w)])
    torch.testing.assert_close(*results)


def test_linear_grpo_loss_repeats_bitwise_on_any_number_of_threads():
    leaves, *rest = loss_inputs(T=300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_results(ops.linear_grpo_loss, leaves, *rest)[3:])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)
    once, again = (loss_results(ops.linear_grpo_loss, leaves, *rest) for _ in range(2))
    assert all(map(torch.equal, once, again))
