"""DeepSeek-V3's router, and rows of tokens to and from the layout sorted by expert.

Shape legend: T tokens, H hidden, E experts, K experts per token, R rows of the permuted layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1kern.errors import UserError
from r1kern.kernels.permute import permute as _permute
from r1kern.kernels.permute import unpermute as _unpermute
from r1kern.kernels.route import route as _route
from r1kern.ops import _check as check


class Routing(NamedTuple):
    """Where each token goes, and where its rows lie when they are sorted by expert.

    Attributes:
        indices: int64 [T, K], experts of each token, best first.
        weights: float [T, K], their mixing weights.
        counts: int64 [E], tokens each expert receives.
        offsets: int64 [E + 1], first row of each expert in the permuted layout, multiples of
            `align`, and the end of the last.
        slots: int32 [T, K], row of each choice there; an expert's rows are in order of tokens.
        order: int32 [R], the choice t * K + k of each row, -1 on padding rows.
        score_sums: float [E], sum over tokens of s_te / sum_e' s_te', s the raw scores: what
            balance losses are made of (arXiv 2412.19437, equations 18-20).
    """

    indices: Tensor
    weights: Tensor
    counts: Tensor
    offsets: Tensor
    slots: Tensor
    order: Tensor
    score_sums: Tensor


class Permutation(NamedTuple):
    """A layout of its own making for `permute` and `unpermute`: the two fields they read.

    Attributes:
        slots: int32 [T, K], rows each token goes to.
        order: int32 [R], the choice t * K + k of each row, -1 on rows that no slot names.
    """

    slots: Tensor
    order: Tensor


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    scale: float = 1.0,
    normalize: bool = True,
    align: int = 1,
) -> Routing:
    """DeepSeek-V3's group-limited router (arXiv 2412.19437, equations 12-16 and section 2.1.2).

    Scores are sigmoid(logits).  `score + bias` selects: of the groups of E / num_groups consecutive
    experts the `topk_groups` with the greatest sum of their best two, and among their experts the
    `topk` best.  Of equal candidates the lowest index wins.  The weights are the selected raw
    scores, the bias being no part of them, divided by their sum + 1e-20 (`normalize`), times
    `scale`.  Only `logits` has a gradient, through the weights and the score sums.  Deterministic.

    Args:
        logits: floating [T, E].
        bias: [E].
        align: each expert's rows of the permuted layout are padded to a multiple of it (128 for
            blockwise FP8).

    Returns:
        `Routing`; weights are float32, or float64 for float64 logits.

    Raises:
        UserError: bad shape, or numbers of groups and experts that cannot be.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UserError(f"logits must be a float tensor [T, E], got {check.describe(logits)}")
    E = logits.shape[1]
    if bias.shape != (E,):
        raise UserError(f"bias must be [{E}], got {check.describe(bias)}")
    check.one_device(logits=logits, bias=bias)
    if num_groups < 1 or E % num_groups:
        raise UserError(f"num_groups must divide the {E} experts, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise UserError(f"topk_groups must be in 1..{num_groups} (num_groups), got {topk_groups}")
    size = E // num_groups
    if size < 2 and topk_groups < num_groups:
        raise UserError(f"num_groups must leave at least 2 of {E} experts a group: {num_groups}")
    if not 1 <= topk <= topk_groups * size:
        raise UserError(f"topk must be in 1..{topk_groups * size}, got {topk}")
    if align < 1:
        raise UserError(f"align must be 1 or more, got {align}")
    layout = num_groups, topk_groups, topk, float(scale), bool(normalize), align
    weights, indices, *rest = _route(logits, bias, *layout)
    return Routing(indices, weights, *rest)


def reroute(
    logits: Tensor,
    routing: Routing,
    indices: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Routing:
    """`routing` with the experts given: their weights from `logits`, and their permuted layout.

    Bit-equal to `routing` where the indices are the same.  Only `logits` has a gradient, through
    the weights; that of the score sums stays with `routing`.

    Args:
        logits: floating [T, E], those of `routing`.
        routing: from `route` with `align` 1.
        indices: int64 [T, K], distinct experts of each token.
        scale, normalize: those of `routing`.

    Raises:
        UserError: indices of another shape or device, or a padded layout.
    """
    if indices.shape != routing.indices.shape:
        raise UserError(
            f"indices must be {list(routing.indices.shape)}, got {check.describe(indices)}"
        )
    check.one_device(logits=logits, indices=indices)
    if len(routing.order) != indices.numel():
        raise UserError("a layout padded by `align` cannot be rerouted: route with align=1")
    K = indices.shape[1]
    # The op itself on the given experts alone; a bias that falls faster than scores keeps them in
    # order, so that the weights are rounded as they are in `route`.
    bias = torch.arange(2.0 * K, 0.0, -2.0, device=logits.device)
    chosen = logits.gather(1, indices)
    weights = _route(chosen, bias, 1, 1, K, float(scale), bool(normalize), 1)[0]
    order = indices.flatten().argsort(stable=True)
    slots = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )
    counts = torch.zeros_like(routing.counts)
    counts.scatter_add_(0, indices.flatten(), torch.ones_like(order))
    return routing._replace(
        indices=indices,
        weights=weights,
        counts=counts,
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        slots=slots.int().view_as(indices),
        order=order.int(),
    )


def permute(x: Tensor, routing: Routing | Permutation) -> Tensor:
    """Each token's row once for each of its experts, sorted by expert; padding rows are 0.

    Args:
        x: [T, H].
        routing: from `route` on T tokens.

    Returns:
        [R, H], row `routing.slots[t, k]` of it equal to `x[t]`, bit for bit; differentiable.

    Raises:
        UserError: another number of tokens, or another device.
    """
    if x.dim() != 2 or len(x) != len(routing.slots):
        raise UserError(f"x must be [{len(routing.slots)}, H], got {check.describe(x)}")
    check.one_device(x=x, routing=routing.slots)
    return _permute(x, routing.slots, routing.order)


def unpermute(
    rows: Tensor, routing: Routing | Permutation, weights: Tensor | None = None
) -> Tensor:
    """The rows of each token's experts summed, in float32: the reverse of `permute`.

    Args:
        rows: floating [R, H], sorted by expert.
        routing: from `route`.
        weights: [T, K] to weigh the rows with, such as `routing.weights`; all 1 by default.

    Returns:
        [T, H] in the dtype of `rows`; differentiable in `rows` and `weights`.

    Raises:
        UserError: shapes or devices that do not fit.
    """
    if rows.dim() != 2 or len(rows) != len(routing.order) or not rows.is_floating_point():
        raise UserError(f"rows must be float [{len(routing.order)}, H], got {check.describe(rows)}")
    if weights is not None and weights.shape != routing.slots.shape:
        raise UserError(
            f"weights must be {list(routing.slots.shape)}, got {check.describe(weights)}"
        )
    check.one_device(rows=rows, routing=routing.slots, weights=weights)
    return _unpermute(rows, routing.slots, routing.order, weights)
