"""LM head and GRPO loss in one: 6 T V H FLOPs with both gradients, none of it in the backward.

A per-token loss API must make the logits again in its backward (8 T V H), because the upstream
gradient arrives later.  In GRPO a row's coefficient depends on its own log-prob and on numbers
known beforehand, so that each chunk goes logits -> statistics -> exchange over the shards -> loss
and coefficient -> gradient in place -> hidden and weight gradients, and the backward only scales.
Rows whose coefficient is zero (clipped, or without advantage where there is neither KL nor entropy
term) are left out of the last two products.

Shape legend: T tokens, n of them in a chunk, m of those with a gradient, H hidden, V rows of this
rank's vocabulary shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern.kernels import head
from r1kern.kernels.objective import clipped_term, kl_term

METRICS = (
    "ratio",
    "clip_fraction",
    "clip_low_fraction",
    "clip_high_fraction",
    "kl",
    "entropy",
    "mismatch",
)


@torch.library.custom_op("r1kern::linear_grpo_loss", mutates_args=())
def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampled_logp: Tensor | None,
    advantages: Tensor,
    share: Tensor,
    temperature: float,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str,
    entropy_coef: float,
    importance_cap: float | None,
    group: str | None,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums of `METRICS` over the rows [7], greatest mismatch, hidden and weight gradients.

    `advantages`, `share` (each row's weight in the loss) and the log-probs are [T]; see
    `r1kern.ops.linear_grpo_loss`.  The gradients are empty without `with_gradients`.
    """
    hidden, weight = hidden.contiguous(), weight.contiguous()
    columns, widest = head.shard_columns(targets, len(weight), group)
    real = head.accumulator(hidden)
    loss = hidden.new_zeros((), dtype=torch.float64)
    sums, largest = hidden.new_zeros(len(METRICS), dtype=torch.float64), loss.to(real)
    grad_hidden = torch.zeros_like(hidden) if with_gradients else hidden.new_empty(0)
    grad_weight = head.fresh(weight, weight.shape if with_gradients else (0, weight.shape[1]), real)
    grad_weight.zero_()
    for rows, z in head.chunks(hidden, weight, keep=with_gradients, widest=widest):
        here = columns[rows]
        stats = head.logits_statistics(hidden[rows], weight, here, temperature, z)
        logp, entropy, peak, total = head.combine(stats, group)
        value, g, h, counted, gap = _rows(
            logp,
            entropy,
            *(None if x is None else x[rows] for x in (old_logp, ref_logp, sampled_logp)),
            advantages[rows],
            share[rows],
            clip=(clip_low, clip_high),
            beta=beta,
            kl=kl,
            entropy_coef=entropy_coef,
            importance_cap=importance_cap,
        )
        loss -= value.sum()
        sums += counted
        largest = torch.maximum(largest, gap)
        if not with_gradients:
            continue
        live = None
        if beta == 0 and entropy_coef == 0:
            live = g.nonzero()[:, 0]
            live = None if len(live) == len(g) else live
        terms = head.gradient_terms(entropy, total, -g, -h, temperature)
        dz = head.dlogits_(z, live, here, peak, *terms).to(hidden.dtype)
        x = hidden[rows] if live is None else hidden[rows][live]
        if live is None:
            torch.mm(dz, weight, out=grad_hidden[rows])
        elif len(live):
            grad_hidden[rows.start + live] = dz @ weight
        head.add_weight_gradient(grad_weight, dz, x)
    return loss.to(real), sums.to(real), largest, grad_hidden, grad_weight.to(weight.dtype)


def _rows(
    logp, entropy, old, ref, sampled, A, share, *, clip, beta, kl, entropy_coef, importance_cap
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each row: its part of J, dJ/dlogp, dJ/dentropy; sums of `METRICS`; greatest mismatch."""
    old = logp if old is None else old
    log_rho = logp - old
    term = clipped_term(log_rho, A, *clip)
    gap = torch.zeros_like(logp) if sampled is None else old - sampled
    weighed = share if importance_cap is None else share * gap.exp().clamp(max=importance_cap)
    value, g = term.value * weighed, term.slope * weighed
    k = torch.zeros_like(logp)
    if ref is not None:
        k, dk = kl_term(logp, ref, log_rho, kl)
        if beta != 0:
            value, g = value - beta * share * k, g - beta * share * dk
    if entropy_coef != 0:
        value = value + entropy_coef * share * entropy
    counted = (term.rho, term.low | term.high, term.low, term.high, k, entropy, gap.abs())
    sums = torch.stack([c.sum(dtype=logp.dtype) for c in counted])
    return value, g, entropy_coef * share, sums, gap.abs().amax()


@loss_and_gradients.register_fake
def _(hidden, weight, *rest):
    loss = hidden.new_empty((), dtype=head.accumulator(hidden))
    like = (hidden, weight) if rest[-1] else (hidden[:0, 0], weight[:0])
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
    return loss, loss.new_empty(len(METRICS)), torch.empty_like(loss), *grads


class LinearGRPOLoss(torch.autograd.Function):
    """`loss_and_gradients` with its backward: takes its arguments, returns its first three results.

    Not `register_autograd`, where the gradients would be visible outputs of the op and their scaled
    copy, the largest tensor of the step, a second one.  Here they are handed over and scaled in
    place, so that the backward runs once.
    """

    @staticmethod
    def forward(ctx, *args):
        loss, sums, largest, *ctx.gradients = loss_and_gradients(*args)
        ctx.mark_non_differentiable(sums, largest)
        ctx.arguments = len(args)
        return loss, sums, largest

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("linear_grpo_loss: its backward runs once, retain_graph or not")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (g.mul_(grad_loss.to(g.dtype)) for g in gradients)
        return *scaled, *[None] * (ctx.arguments - 2)
