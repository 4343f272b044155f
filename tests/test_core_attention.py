"""Packed attention: which kernel, the grids' bounded padding, and results against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1kern import distributed
from r1kern.errors import UserError
from r1kern.model.attention_kernel import Facts, choose_kernel

BF16, F32 = torch.bfloat16, torch.float32
HOPPER = Facts(capability=(9, 0), varlen=True, flash=True)
LAPTOP = Facts(capability=(0, 0), varlen=False, flash=False)


@pytest.fixture(scope="module", autouse=True)
def world():
    """Megatron on CPU must be in place before the model's modules are imported."""
    yield distributed.start(seed=0)
    distributed.shutdown()


@pytest.mark.parametrize(("option", "facts", "dtype", "head_dim", "kernel"), [
    ("auto", HOPPER, BF16, 192, "varlen"),
    ("flash", HOPPER, BF16, 192, "flash"),
    ("sdpa", HOPPER, BF16, 192, "sdpa"),
    ("auto", HOPPER, F32, 192, "sdpa"),
    ("auto", HOPPER, BF16, 576, "sdpa"),
    ("auto", Facts((7, 5), True, False), BF16, 128, "sdpa"),
    ("auto", Facts((9, 0), False, True), BF16, 128, "sdpa"),
    ("auto", LAPTOP, F32, 32, "sdpa"),
    ("sdpa", LAPTOP, F32, 32, "sdpa"),
])  # fmt: skip
def test_the_kernel_is_what_can_run_here(option, facts, dtype, head_dim, kernel):
    assert choose_kernel(option, facts, dtype=dtype, head_dim=head_dim) == kernel


@pytest.mark.parametrize(("option", "facts", "dtype", "head_dim", "reasons"), [
    ("flash", LAPTOP, F32, 20, ["not installed", "capability 8.0", "bfloat16", "heads of 20"]),
    ("varlen", LAPTOP, BF16, 32, ["no torch.nn.attention.varlen", "capability 8.0"]),
    ("varlen", HOPPER, F32, 32, ["model.dtype=bfloat16, not float32"]),
    ("flash", HOPPER, BF16, 576, ["multiple of 8 up to 256"]),
])  # fmt: skip
def test_a_kernel_that_cannot_work_is_refused_with_all_reasons(
    option, facts, dtype, head_dim, reasons
):
    with pytest.raises(UserError) as refused:
        choose_kernel(option, facts, dtype=dtype, head_dim=head_dim)
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"model.attention={option} cannot work: ")
    assert all(reason in line for reason in (*reasons, "model.attention=auto"))


def test_this_process_has_a_kernel():
    assert choose_kernel("auto", Facts.here(), dtype=F32, head_dim=32) == "sdpa"


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_grids_hold_every_token_once_with_bounded_padding(lengths):
    from r1kern.model.core_attention import SHORT, Packing

    packing = Packing.of(torch.tensor([0, *lengths]).cumsum(0).int(), len(lengths) - 1)
    grids, tokens = packing.grids, sum(lengths)
    assert torch.equal(grids.take[grids.place], torch.arange(tokens))
    places = sum(count * longest for count, longest in grids.shapes)
    assert len(grids.take) == places
    assert sum(count for count, _ in grids.shapes) == len(lengths)
    short = sum(n <= SHORT for n in lengths)
    assert places <= 2 * tokens + SHORT * short
    assert len(grids.shapes) <= 7
    assert packing.positions.tolist() == [p for n in lengths for p in range(n)]
    last = lengths[-1]
    assert packing.sequence_ids[-last:].tolist() == [-1] * last


def test_packed_attention_is_that_of_each_sequence_alone():
    """Forward and backward, heads in groups, d_v narrower than d_qk, against float64."""
    from r1kern.model.core_attention import CoreAttention, Packing

    lengths, scale = [3, 200, 1, 70, 64, 65, 130, 9], 0.2
    config = SimpleNamespace(attention_kernel="sdpa")
    attention = CoreAttention(config, 1, None, "self", scale)
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 32), (2, 32), (2, 16)
    qkv = [torch.randn(sum(lengths), *s, generator=generator) for s in shapes]
    upstream = torch.randn(sum(lengths), 64, generator=generator)
    for x in qkv:
        x.requires_grad_()
    packing = Packing.of(torch.tensor([0, *lengths]).cumsum(0).int())
    assert len(packing.grids.shapes) == 3
    found = attention(*qkv, None, packing)
    found_grads = torch.autograd.grad(found, qkv, upstream)

    exact = [x.detach().double().requires_grad_() for x in qkv]
    alone = torch.cat(
        [_plain(*x, scale) for x in zip(*(x.split(lengths) for x in exact), strict=True)]
    )
    exact_grads = torch.autograd.grad(alone, exact, upstream.double())
    for mine, theirs in zip((found, *found_grads), (alone, *exact_grads), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-6)


def _plain(q, k, v, scale):
    """Causal attention of one sequence, [L, heads, d]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    share = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", share, v).flatten(1)
