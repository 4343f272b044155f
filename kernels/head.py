"""Parts of the LM-head ops: logits chunk by chunk, their statistics, their gradient in place.

A chunk of rows is one matrix product on the way in (logits) and two on the way back (hidden,
weight); between them lie one pass for the statistics and one that turns logits into their gradient.
On CUDA the first pass is part of the product (`head_triton`), on CPU both are C++ (`csrc/head.h`).

Shape legend: T tokens, n of them in a chunk, H hidden, V rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from r1kern import _C
from r1kern.errors import UserError

LOGITS_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}
"""Most bytes of logits, all copies together, that exist at any time; on CPU near the cache size."""

TILE_ROWS = 128
"""Rows of the matrix products' largest tile: a chunk of whole tiles wastes none of one."""

STATISTICS_ROWS = 4096
"""Rows of a chunk where no logits are kept: bounds the partial statistics of the CUDA kernel."""


def chunks(
    hidden: Tensor, weight: Tensor, *, keep: bool, widest: int = 0
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yields (rows, buffer for their logits [n, V]), one chunk after another, in one buffer.

    CUDA holds logits in the inputs' dtype, and none (None) unless they are to be kept for the
    gradient; CPU in float32 at least.  `widest` is the largest shard where ranks must cut alike.
    """
    T, V = len(hidden), len(weight)
    if hidden.is_cuda and not keep:
        n, logits = STATISTICS_ROWS, None
    else:
        dtype = hidden.dtype if hidden.is_cuda else accumulator(hidden)
        # Narrow inputs pass through a second copy on CPU: the product, and the gradient as operand.
        copies = dtype.itemsize + (0 if dtype == hidden.dtype else hidden.dtype.itemsize)
        n = max(1, LOGITS_BYTES[hidden.device.type] // (max(V, widest) * copies))
        if n > TILE_ROWS:
            n -= n % TILE_ROWS
        n = max(1, min(n, T))
        # On CPU column by column: the products are faster so.
        logits = hidden.new_empty((n, V)) if hidden.is_cuda else fresh(hidden, (V, n), dtype).t()
    for start in range(0, T, n):
        rows = slice(start, min(start + n, T))
        yield rows, None if logits is None else logits[: rows.stop - start]


def fresh(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, on CPU with huge pages where there are any."""
    x = like.new_empty(shape, dtype=dtype)
    if x.device.type == "cpu":
        _C.prefer_huge_pages(x.data_ptr(), x.nbytes)
    return x


def accumulator(x: Tensor) -> torch.dtype:
    """Dtype of statistics and sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def fill_logits(hidden: Tensor, weight: Tensor, temperature: float, logits: Tensor) -> None:
    """hidden [n, H] @ weight.T / temperature into `logits` [n, V]."""
    if hidden.dtype != logits.dtype:
        logits.copy_(hidden @ weight.t()).mul_(1 / temperature)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out=logits)
        if temperature != 1:
            logits.mul_(1 / temperature)
    else:
        logits.addmm_(hidden, weight.t(), beta=0, alpha=1 / temperature)


def logits_statistics(
    hidden: Tensor, weight: Tensor, columns: Tensor, temperature: float, logits: Tensor | None
) -> Tensor:
    """Of each row: max z, sum exp(z - max), sum exp(z - max)(z - max), z at its column: [4, n].

    Leaves z in `logits` where that is given (CPU needs it).
    """
    if hidden.is_cuda:
        from r1kern.kernels import head_triton

        return head_triton.logits_stats(hidden, weight, columns, 1 / temperature, logits)
    fill_logits(hidden, weight, temperature, logits)
    n, V = logits.shape
    stats = logits.new_empty(4, n)
    _C.logits_stats(
        *(logits.itemsize, logits.data_ptr(), n, V, logits.stride(1)),
        *(columns.data_ptr(), stats.data_ptr(), _threads()),
    )
    return stats


def dlogits_(
    logits: Tensor,
    live: Tensor | None,
    columns: Tensor,
    shift: Tensor,
    c0: Tensor,
    c1: Tensor,
    g: Tensor,
) -> Tensor:
    """Logits to their gradient, in place and compacted; returns its rows [m, V].

    Row i < m is made from row r = live[i] of the chunk (all rows where `live` is None):
    dz_j = exp(z_j - shift_r) (c0_r + c1_r (z_j - shift_r)) + g_r [j = columns_r].
    """
    m = len(logits) if live is None else len(live)
    if logits.is_cuda:
        from r1kern.kernels import head_triton

        head_triton.dlogits_(logits, live, columns, shift, c0, c1, g)
    else:
        _C.dlogits(
            *(logits.itemsize, logits.data_ptr(), logits.shape[1], logits.stride(1)),
            *(0 if live is None else live.data_ptr(), m),
            *(x.data_ptr() for x in (columns, shift, c0, c1, g)),
            _threads(),
        )
    return logits[:m]


def add_weight_gradient(grad_weight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """grad_weight [V, H] += dlogits.T @ hidden, summed in the dtype of `grad_weight`."""
    if hidden.dtype == grad_weight.dtype:
        grad_weight.addmm_(dlogits.t(), hidden)
    elif hidden.is_cuda:
        torch.addmm(grad_weight, dlogits.t(), hidden, out_dtype=grad_weight.dtype, out=grad_weight)
    else:
        grad_weight += dlogits.t() @ hidden


def combine(stats: Tensor, group: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [4, n] of each shard -> log-prob, entropy, greatest logit, sum of exp(z - it).

    One collective of 16 bytes a token.  Combined locally in rank order: the same bits everywhere.
    """
    maxima, totals, moments, targets_z = gather(stats, group).unbind(1)
    # Each shard's sums are about its own maximum; they are moved to the maximum over all shards.
    peak = maxima.amax(0)
    shift = maxima - peak
    scale = shift.exp()
    total = (totals * scale).sum(0)
    moment = ((moments + shift * totals) * scale).sum(0)
    log_total = total.log()
    return targets_z.sum(0) - peak - log_total, log_total - moment / total, peak, total


def gradient_terms(
    entropy: Tensor, total: Tensor, grad_logp: Tensor, grad_entropy: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """c0, c1 and g of `dlogits_` about the greatest logit, from the gradients g and h of a row:

    dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy),  over the temperature.
    """
    g, h = grad_logp / temperature, grad_entropy / temperature
    mean = total.log() - entropy  # of z - peak, under p
    return (h * mean - g) / total, -h / total, g


def shard_columns(targets: Tensor, V: int, group: str | None) -> tuple[Tensor, int]:
    """Column of each target in this rank's shard, -1 where another rank holds it; largest shard.

    The ranks agree on T before anything else is exchanged: an error is raised on all of them.
    """
    T = len(targets)
    shards = gather(targets.new_tensor([V, T]), group).tolist()
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
    return torch.where((columns >= 0) & (columns < V), columns, -1), max(sizes)


def gather(x: Tensor, group: str | None) -> Tensor:
    """Every rank's `x`, [ranks, ...]."""
    if group is None:
        return x[None]
    process_group = _resolve_process_group(group)
    everyone = x.new_empty((process_group.size(), *x.shape))
    dist.all_gather(list(everyone), x.contiguous(), group=process_group)
    return everyone


def _threads() -> int:
    return torch.get_num_threads()
