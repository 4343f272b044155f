"""The GRPO loss's Triton kernel in Triton's interpreter, against the op's plain-torch kernel."""

import math

import pytest
import torch
from interpreter import interpreted

from r1kern.kernels import objective

LOSSES = {
    "paper": {},
    "no reference": {"beta": 0.0, "no_ref": True},
    "unbiased": {"beta": 0.4, "kl": "k3_unbiased"},
    "k2, weighed": {"beta": 0.4, "kl": "k2", "weighed": True},
    "gspo": {"ratio": "sequence", "beta": 0.2, "clip_low": 0.02, "clip_high": 0.05},
    "gspo, weighed, no reference": {"ratio": "sequence", "no_ref": True, "weighed": True},
    "completion": {"ratio": "completion", "beta": 0.1, "clip_high": 0.4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("B", "S"), [(3, 5), (3, 4100), (0, 7), (2, 0)])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_grpo_loss_is_the_plain_one(poisoned, options, B, S, dtype):
    options = {
        "ratio": "token",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "beta": 0.001,
        "kl": "k3",
    } | options
    torch.manual_seed(0)
    old = -3 * torch.rand(B, S)
    logp, ref = (old + 0.3 * torch.randn(B, S) for _ in range(2))
    live = torch.rand(B, S) < 0.8
    if B > 1 and S:
        live[1] = False
    logp[~live] = math.nan
    wide = torch.promote_types(dtype, torch.float32)
    share = torch.where(live, torch.rand(B, S) / max(B * S, 1), 0).to(wide)
    weights = torch.rand(B, S).to(wide) if options.pop("weighed", False) else None
    grids = [x.to(dtype) for x in (logp, old, ref)]
    if options.pop("no_ref", False):
        grids[2] = None
    arguments = (*grids, torch.randn(B).to(wide), live, share, weights, *options.values())
    expected = objective.grpo_loss(*arguments)
    with interpreted("objective_triton") as kernels:
        got = kernels.grpo_loss(*arguments)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for x, t in zip(got, expected, strict=True):
        assert x.dtype == t.dtype and x.shape == t.shape
        atol = tolerance * (t.double().abs().max().item() if t.numel() else 1)
        torch.testing.assert_close(x.double(), t.double(), rtol=tolerance, atol=atol)


def test_the_kl_of_close_policies_does_not_cancel():
    """At a log-ratio of 1e-4 k3 is 5e-9, and e^x - 1 - x in float32 is noise."""
    x = torch.linspace(-1e-4, 1e-4, 300)[None]
    old, live = torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)
    share = torch.ones_like(x)
    rest = (torch.zeros(1), live, share, None, "token", 0.2, 0.2, 1.0, "k3")
    with interpreted("objective_triton") as kernels:
        loss, gradient, sums = kernels.grpo_loss(old, old, x, *rest)
    exact = x.double().expm1()
    torch.testing.assert_close(sums[4].double(), (exact - x.double()).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), -exact, rtol=1e-5, atol=1e-12)
    assert loss == sums[4]
