"""GRPO's per-token objective with its derivative, and the loss from given log-probs as a custom op.

The derivative is written out because the fused head needs it before any backward: a row's
coefficient depends on its own log-prob and on numbers known beforehand (DeepSeekMath,
arXiv 2402.03300, equation 21: the gradient coefficient).

Shapes are any, equal ones: [n] rows of the head or a [B, S] grid of sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("ratio", "clip_fraction", "clip_low_fraction", "clip_high_fraction", "kl")


class Clipped(NamedTuple):
    """The policy term of each token: value, d value / d log rho, rho, and where it is clipped."""

    value: Tensor
    slope: Tensor
    rho: Tensor
    low: Tensor
    high: Tensor


def clipped_term(log_rho: Tensor, A: Tensor, clip_low: float, clip_high: float) -> Clipped:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), DeepSeek-R1 equation (1)."""
    rho = log_rho.exp()
    low = (A < 0) & (rho < 1 - clip_low)
    high = (A > 0) & (rho > 1 + clip_high)
    value = torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return Clipped(value, torch.where(low | high, 0, rho * A), rho, low, high)


def kl_term(logp: Tensor, ref_logp: Tensor, log_rho: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """An estimate of KL(pi || pi_ref) at each token, and its derivative in `logp`.

    With r = pi_ref / pi:  "k3": r - log r - 1, equation (2) of the paper.  "k2": (log r)^2 / 2,
    whose gradient is that of the KL in expectation on policy, k3's is not.  "k3_unbiased": rho k3,
    off-policy samples weighed back to the policy (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
    """
    log_r = ref_logp - logp
    if kl == "k2":
        return log_r * log_r / 2, -log_r
    value, slope = log_r.expm1() - log_r, -log_r.expm1()
    if kl == "k3_unbiased":
        rho = log_rho.exp()
        value, slope = rho * value, rho * (value + slope)
    return value, slope


@torch.library.custom_op("r1kern::grpo_loss", mutates_args=(), device_types="cpu")
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
    """Loss, its gradient in `logp` [B, S], and the sums of `METRICS` over live tokens [5].

    `share` [B, S] weighs each token's term; see `r1kern.ops.grpo_loss` for the rest.
    """

    def shown(x: Tensor) -> Tensor:
        return torch.where(live, x.to(share.dtype), 0)

    A, x = shown(advantages[:, None]), shown(logp)
    log_rho = token_log_rho = x - shown(old_logp)
    over = live.sum(1, keepdim=True).clamp(min=1) if ratio == "sequence" else 1
    if ratio != "token":
        log_rho = shown(log_rho.sum(1, keepdim=True) / over)
    term = clipped_term(log_rho, A, clip_low, clip_high)
    weighed = share if importance_weights is None else share * shown(importance_weights)
    value, slope = term.value * weighed, term.slope * weighed
    if ratio != "token":
        slope = shown(slope.sum(1, keepdim=True) / over)
    counted = [shown(term.rho), term.low | term.high, term.low, term.high]
    if ref_logp is None:
        counted.append(torch.zeros_like(x))
    else:
        k, dk = kl_term(x, shown(ref_logp), token_log_rho, kl)
        counted.append(k)
        if beta != 0:
            value, slope = value - beta * share * k, slope - beta * share * dk
    sums = torch.stack([c.sum(dtype=share.dtype) for c in counted])
    return -value.sum(), -slope.to(logp.dtype), sums


@grpo_loss.register_kernel("cuda")
def _(logp, old_logp, ref_logp, advantages, live, share, weights, ratio, low, high, beta, kl):
    from r1kern.kernels import objective_triton

    return objective_triton.grpo_loss(
        *(logp, old_logp, ref_logp, advantages, live, share, weights),
        *(ratio, low, high, beta, kl),
    )


@grpo_loss.register_fake
def _(logp, old_logp, ref_logp, advantages, live, share, weights, ratio, low, high, beta, kl):
    return share.new_empty(()), torch.empty_like(logp), share.new_empty(len(METRICS))


def _setup(ctx, inputs, output) -> None:
    _, gradient, sums = output
    ctx.mark_non_differentiable(gradient, sums)
    ctx.save_for_backward(gradient)


def _gradient(ctx, grad_loss, _gradient, _sums):
    (gradient,) = ctx.saved_tensors
    return (grad_loss.to(gradient.dtype) * gradient, *[None] * 11)


grpo_loss.register_autograd(_gradient, setup_context=_setup)
