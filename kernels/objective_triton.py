"""The GRPO loss from given log-probs on CUDA: loss, gradient and metrics in one pass over the grid.

Shape legend: B sequences, S longest completion, P parts a row is cut into.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
SPAN = 4096
"""Columns of one program where the ratio is a token's own; else a program has a whole row."""

RATIOS = {"token": 0, "sequence": 1, "completion": 2}
KLS = {"k3": 0, "k3_unbiased": 1, "k2": 2}
SUMS = 6  # the loss and `objective.METRICS`
OPTIONS = dict(num_warps=4, num_stages=1)


@triton.jit
def _shown(x, at, live, like):
    return tl.load(x + at, mask=live, other=0).to(like.dtype.element_ty)


@triton.jit
def _kl(logp, ref_logp, log_rho, KL: tl.constexpr):
    log_r = ref_logp - logp
    if KL == 2:
        return log_r * log_r / 2, -log_r
    # Near 0, where policies are close, e^x - 1 - x would cancel: there its series.
    series = tl.full(log_r.shape, 1, log_r.dtype)
    for n in tl.static_range(10):
        series = 1 + log_r / (12 - n) * series
    near = tl.abs(log_r) < 0.5
    value = tl.where(near, log_r * log_r / 2 * series, tl.exp(log_r) - 1 - log_r)
    slope = -(log_r + value)
    if KL == 1:
        rho = tl.exp(log_rho)
        return rho * value, rho * (value + slope)
    return value, slope


@triton.jit
def _grpo_loss(
    logp, old_logp, ref_logp, advantages, live, share, weights, gradient, partial, S, span,
    CLIP_LOW: tl.constexpr, CLIP_HIGH: tl.constexpr, BETA: tl.constexpr,
    RATIO: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, S)
    zero = tl.zeros([BLOCK], share.dtype.element_ty)
    # In this dtype from the start: a bare constant beside float64 is float32 before Triton 3.9.
    floor = tl.full([], 1 - CLIP_LOW, share.dtype.element_ty)
    ceiling = tl.full([], 1 + CLIP_HIGH, share.dtype.element_ty)
    beta = tl.full([], BETA, share.dtype.element_ty)
    A = tl.load(advantages + row).to(share.dtype.element_ty)
    over = tl.full([], 1, share.dtype.element_ty)
    log_rho_row = tl.full([], 0, share.dtype.element_ty)
    if RATIO != 0:
        total = zero
        count = zero
        for i in range(first, last, BLOCK):
            at = row * S + i + tl.arange(0, BLOCK)
            here = tl.load(live + at, mask=i + tl.arange(0, BLOCK) < last, other=0) != 0
            total += _shown(logp, at, here, share) - _shown(old_logp, at, here, share)
            count += here.to(share.dtype.element_ty)
        if RATIO == 1:
            over = tl.maximum(tl.sum(count, 0), 1)
        log_rho_row = tl.sum(total, 0) / over

    loss, ratios, lows, highs, kls, slopes = zero, zero, zero, zero, zero, zero
    for i in range(first, last, BLOCK):
        at = row * S + i + tl.arange(0, BLOCK)
        inside = i + tl.arange(0, BLOCK) < last
        here = tl.load(live + at, mask=inside, other=0) != 0
        x = _shown(logp, at, here, share)
        weight = _shown(share, at, here, share)
        log_rho_token = x - _shown(old_logp, at, here, share)
        rho = tl.exp(log_rho_token if RATIO == 0 else log_rho_row + zero)
        low = tl.where(A < 0, rho, 1) < floor
        high = tl.where(A > 0, rho, 1) > ceiling
        clipped = tl.minimum(tl.maximum(rho, floor), ceiling)
        weighed = weight
        if weights is not None:
            weighed *= _shown(weights, at, here, share)
        loss -= tl.where(here, tl.minimum(rho * A, clipped * A) * weighed, 0)
        slope = tl.where(here, tl.where(low | high, 0, rho * A * weighed), 0)
        ratios += tl.where(here, rho, 0)
        lows += tl.where(here, tl.where(low, 1, 0), 0)
        highs += tl.where(here, tl.where(high, 1, 0), 0)
        pull = zero
        if ref_logp is not None:
            k, dk = _kl(x, _shown(ref_logp, at, here, share), log_rho_token, KL)
            kls += tl.where(here, k, 0)
            loss += beta * weight * k
            pull = beta * weight * dk
        if RATIO == 0:
            out = (pull - slope).to(gradient.dtype.element_ty)
            tl.store(gradient + at, out, mask=inside)
        slopes += slope

    if RATIO != 0:
        push = tl.sum(slopes, 0) / over
        for i in range(first, last, BLOCK):
            at = row * S + i + tl.arange(0, BLOCK)
            inside = i + tl.arange(0, BLOCK) < last
            here = tl.load(live + at, mask=inside, other=0) != 0
            pull = zero
            if ref_logp is not None:
                x = _shown(logp, at, here, share)
                log_rho_token = x - _shown(old_logp, at, here, share)
                _, dk = _kl(x, _shown(ref_logp, at, here, share), log_rho_token, KL)
                pull = beta * _shown(share, at, here, share) * dk
            out = (pull - tl.where(here, push, 0)).to(gradient.dtype.element_ty)
            tl.store(gradient + at, out, mask=inside)

    to = partial + (row * tl.num_programs(1) + tl.program_id(1)) * 6
    tl.store(to, tl.sum(loss, 0))
    tl.store(to + 1, tl.sum(ratios, 0))
    tl.store(to + 2, tl.sum(lows + highs, 0))
    tl.store(to + 3, tl.sum(lows, 0))
    tl.store(to + 4, tl.sum(highs, 0))
    tl.store(to + 5, tl.sum(kls, 0))


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    live: Tensor,
    share: Tensor,
    importance_weights: Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `objective.grpo_loss`: loss, gradient [B, S], sums of the metrics [5].

    Arithmetic in the dtype of `share`, float32 or float64.  Deterministic.
    """
    B, S = logp.shape
    gradient = torch.empty_like(logp, memory_format=torch.contiguous_format)
    span = SPAN if ratio == "token" else max(S, 1)
    parts = triton.cdiv(S, span)
    partial = share.new_empty(B, parts, SUMS)
    grids = (logp, old_logp, ref_logp, advantages, live.view(torch.uint8), share)
    if partial.numel():
        _grpo_loss[(B, parts)](
            *(None if x is None else x.contiguous() for x in (*grids, importance_weights)),
            *(gradient, partial, S, span),
            **_constants(ratio, clip_low, clip_high, beta, kl),
            **OPTIONS,
        )
    loss, *sums = partial.sum((0, 1)).unbind()
    return loss, gradient, torch.stack(sums)


def _constants(ratio: str, clip_low: float, clip_high: float, beta: float, kl: str) -> dict:
    options = dict(CLIP_LOW=clip_low, CLIP_HIGH=clip_high, BETA=beta)
    return options | dict(RATIO=RATIOS[ratio], KL=KLS[kl], BLOCK=BLOCK)


def variants() -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, options, aligned) of what the launcher compiles."""
    for x, ratio, kl in itertools.product(("fp32", "bf16"), RATIOS, KLS):
        grids = dict(logp=f"*{x}", old_logp=f"*{x}", ref_logp=f"*{x}", advantages="*fp32")
        grids |= dict(live="*u8", share="*fp32", weights="*fp32", gradient=f"*{x}", partial="*fp32")
        constants = _constants(ratio, 0.2, 0.28, 0.001, kl)
        signature = {**grids, "S": "i32", "span": "i32"}
        yield f"{x} {ratio} {kl}", _grpo_loss, signature, constants, OPTIONS, set(grids)
