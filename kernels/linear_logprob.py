"""LM head -> log-prob and entropy: the custom op, its plain-torch kernel and its gradient.

Shape legend: T tokens, H hidden, V rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from r1kern.errors import UserError

LOGITS_BYTES = 256 << 20
"""Most bytes of logits, all copies together, that `linear_logprob` holds at any time."""


@torch.library.custom_op("r1kern::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, and for the backward: greatest logit, sum of exp(z - it), `_columns`."""
    columns = _columns(targets, len(weight), group)
    maximum, total, moment, target = stats = hidden.new_empty(
        (4, len(hidden)), dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    for rows, z, e in _logits(hidden, weight, temperature):
        here = columns[rows]
        found = z.gather(1, here.clamp(min=0)[:, None])[:, 0]
        target[rows] = torch.where(here >= 0, found, 0)
        torch.amax(z, 1, out=maximum[rows])
        torch.exp(z.sub_(maximum[rows, None]), out=e)
        torch.sum(e, 1, out=total[rows])
        torch.sum(e.mul_(z), 1, out=moment[rows])

    # Each shard's sums of exp(z - m) and exp(z - m)(z - m) are about its own maximum m; below they
    # are moved to the maximum over all shards.
    maxima, totals, moments, targets_z = _gather(stats, group).unbind(1)
    peak = maxima.amax(0)
    shift = maxima - peak
    scale = shift.exp()
    total = (totals * scale).sum(0)
    moment = ((moments + shift * totals) * scale).sum(0)
    log_total = total.log()
    logp = targets_z.sum(0) - peak - log_total
    return logp, log_total - moment / total, peak, total, columns


@linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
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
    """dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy), g and h the gradients given."""
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=total.dtype)
    if grad_logp is None:
        grad_logp = torch.zeros_like(total)
    g_by_row = grad_logp[:, None] / temperature
    g_at_target = torch.where(columns[:, None] >= 0, g_by_row, 0)
    if grad_entropy is not None:
        h_by_row = grad_entropy[:, None] / temperature
        mean = (total.log() - entropy)[:, None]  # of z - peak, under p
    columns = columns.clamp(min=0)[:, None]
    for rows, z, spare in _logits(hidden, weight, temperature):
        z.sub_(peak[rows, None])
        if grad_entropy is None:
            dz = z.exp_().mul_(-g_by_row[rows] / total[rows, None])
        else:
            p = torch.exp(z, out=spare).div_(-total[rows, None])
            dz = z.sub_(mean[rows]).mul_(h_by_row[rows]).add_(g_by_row[rows]).mul_(p)
        dz.scatter_add_(1, columns[rows], g_at_target[rows])
        dz = dz.to(hidden.dtype)
        torch.mm(dz, weight, out=grad_hidden[rows])
        if hidden.dtype == total.dtype:
            grad_weight.addmm_(dz.t(), hidden[rows])
        else:
            grad_weight += dz.t() @ hidden[rows]
    return grad_hidden, grad_weight.to(weight.dtype)


@linear_logprob_backward.register_fake
def _(
    hidden, weight, columns, entropy, peak, total, grad_logp, grad_entropy, temperature
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


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


def _logits(
    hidden: Tensor, weight: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (rows, their logits [n, V], a spare buffer of that shape), one chunk after another."""
    T, V = len(hidden), len(weight)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    row_bytes = V * (2 * dtype.itemsize + hidden.dtype.itemsize)
    n = max(1, min(T, LOGITS_BYTES // row_bytes))
    logits, spare = hidden.new_empty((2, n, V), dtype=dtype)
    for start in range(0, T, n):
        rows = slice(start, min(start + n, T))
        z = logits[: rows.stop - start]
        if hidden.dtype == dtype:
            z.addmm_(hidden[rows], weight.t(), beta=0, alpha=1 / temperature)
        else:
            z.copy_(hidden[rows] @ weight.t()).mul_(1 / temperature)
        yield rows, z, spare[: len(z)]


def _columns(targets: Tensor, V: int, group: str | None) -> Tensor:
    """Column of each target in this rank's shard, -1 where another rank holds it.

    The ranks agree on T before anything else is exchanged: an error is raised on all of them.
    """
    T = len(targets)
    shards = _gather(targets.new_tensor([V, T]), group).tolist()
    if any(shard[1] != T for shard in shards):
        raise UserError(f"ranks of tp_group disagree about T: {[shard[1] for shard in shards]}")
    sizes = [shard[0] for shard in shards]
    if min(sizes) == 0:
        raise UserError(f"weight has no rows on a rank of tp_group: shards are {sizes}")
    if T:
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= sum(sizes):
            raise UserError(f"targets must be in [0, {sum(sizes)}), found {low} to {high}")
    rank = 0 if group is None else dist.get_rank(_resolve_process_group(group))
    columns = targets - sum(sizes[:rank])
    return torch.where((columns >= 0) & (columns < V), columns, -1)


def _gather(x: Tensor, group: str | None) -> Tensor:
    """Every rank's `x`, [ranks, ...]: combined locally, the same bits come out everywhere."""
    if group is None:
        return x[None]
    process_group = _resolve_process_group(group)
    everyone = x.new_empty((process_group.size(), *x.shape))
    dist.all_gather(list(everyone), x, group=process_group)
    return everyone
