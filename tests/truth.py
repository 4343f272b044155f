"""What the tests of the ops share: inputs, and how near to the float64 truth is near enough."""

from __future__ import annotations

import torch

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


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


def head_inputs(T=23, H=16, V=37, dtype=F32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(T, H), torch.randn(V, H) * 0.7
    targets = torch.randint(V, (T,))
    if T > 1:
        targets[:2] = torch.tensor([0, V - 1])
    return hidden.to(dtype), weight.to(dtype), targets


def route_inputs(T, E, dtype=F32):
    torch.manual_seed(0)
    return torch.randn(T, E).to(dtype), torch.randn(E) * 0.3


V3 = {"num_groups": 8, "topk_groups": 4, "topk": 8, "scale": 2.5}
