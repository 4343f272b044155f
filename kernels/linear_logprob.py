"""LM head -> log-prob and entropy: the custom op and its gradient, which makes the logits again.

2 T V H FLOPs forward, 6 T V H backward: the upstream gradient is not known before.  Where the loss
is GRPO's it is: see `linear_grpo_loss`, 6 T V H in all.

Shape legend: T tokens, H hidden, V rows of this rank's vocabulary shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern.kernels import head


@torch.library.custom_op("r1kern::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, and for the backward: greatest logit, sum of exp(z - it), columns."""
    columns, _ = head.shard_columns(targets, len(weight), group)
    stats = hidden.new_empty((4, len(hidden)), dtype=head.accumulator(hidden))
    hidden, weight = hidden.contiguous(), weight.contiguous()
    for rows, z in head.chunks(hidden, weight, keep=False):
        stats[:, rows] = head.logits_statistics(hidden[rows], weight, columns[rows], temperature, z)
    return *head.combine(stats, group), columns


@linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = hidden.new_empty(len(hidden), dtype=head.accumulator(hidden))
    return row, *(torch.empty_like(row) for _ in range(3)), torch.empty_like(targets)


@torch.library.custom_op("r1kern::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    entropy: Tensor,
    peak: Tensor,
    total: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    grad_hidden = torch.empty_like(hidden)
    grad_weight = head.fresh(weight, weight.shape, total.dtype).zero_()
    given = (torch.zeros_like(total) if x is None else x for x in (grad_logp, grad_entropy))
    row_terms = columns, peak, *head.gradient_terms(entropy, total, *given, temperature)
    for rows, z in head.chunks(hidden, weight, keep=True):
        head.fill_logits(hidden[rows], weight, temperature, z)
        dz = head.dlogits_(z, None, *(x[rows] for x in row_terms)).to(hidden.dtype)
        torch.mm(dz, weight, out=grad_hidden[rows])
        head.add_weight_gradient(grad_weight, dz, hidden[rows])
    return grad_hidden, grad_weight.to(weight.dtype)


@linear_logprob_backward.register_fake
def _(
    hidden, weight, columns, entropy, peak, total, grad_logp, grad_entropy, temperature
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    )


def _setup(ctx, inputs, output) -> None:
    hidden, weight, _, ctx.temperature, _ = inputs
    _, entropy, peak, total, columns = output
    ctx.mark_non_differentiable(peak, total, columns)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, columns, entropy, peak, total)


def _gradient(ctx, grad_logp, grad_entropy, _peak, _total, _columns):
    grads = linear_logprob_backward(*ctx.saved_tensors, grad_logp, grad_entropy, ctx.temperature)
    return *grads, None, None, None


linear_logprob.register_autograd(_gradient, setup_context=_setup)
