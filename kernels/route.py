"""DeepSeek-V3's router: the custom op, its plain-torch kernel and its gradient.

Shape legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("r1kern::route", mutates_args=())
def route(
    logits: Tensor,
    bias: Tensor,
    num_groups: int,
    topk_groups: int,
    topk: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, indices, counts."""
    T, E = logits.shape
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    choice = scores + bias
    if topk_groups < num_groups:
        by_group = choice.view(T, num_groups, E // num_groups)
        order = _descending(by_group.topk(2).values.sum(2))
        dropped = order[:, topk_groups:, None].expand(-1, -1, E // num_groups)
        by_group.scatter_(1, dropped, -torch.inf)  # in `choice`, which it is a view of
    indices = _descending(choice)[:, :topk].contiguous()
    weights = scores.gather(1, indices)
    if normalize:
        weights /= weights.sum(1, keepdim=True) + 1e-20
    counts = indices.new_zeros(E)
    counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
    return weights.mul_(scale), indices, counts


@route.register_fake
def _(logits, bias, num_groups, topk_groups, topk, scale, normalize):
    T, E = logits.shape
    weights = logits.new_empty((T, topk), dtype=torch.promote_types(logits.dtype, torch.float32))
    indices = torch.empty_like(weights, dtype=torch.int64)
    return weights, indices, indices.new_empty(E)


@torch.library.custom_op("r1kern::route_backward", mutates_args=())
def route_backward(
    logits: Tensor, indices: Tensor, grad_weights: Tensor, scale: float, normalize: bool
) -> Tensor:
    s = logits.gather(1, indices).to(grad_weights.dtype).sigmoid()
    grad_s = grad_weights * scale
    if normalize:
        total = s.sum(1, keepdim=True) + 1e-20
        grad_s = (grad_s - (grad_s * s).sum(1, keepdim=True) / total) / total
    grad = (grad_s * s * (1 - s)).to(logits.dtype)
    return torch.zeros_like(logits).scatter_(1, indices, grad)


@route_backward.register_fake
def _(logits, indices, grad_weights, scale, normalize):
    return torch.empty_like(logits)


def _setup(ctx, inputs, output) -> None:
    logits, _, _, _, _, ctx.scale, ctx.normalize = inputs
    _, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(logits, indices)


def _gradient(ctx, grad_weights, _indices, _counts):
    grad = route_backward(*ctx.saved_tensors, grad_weights, ctx.scale, ctx.normalize)
    return grad, None, None, None, None, None, None


route.register_autograd(_gradient, setup_context=_setup)


def _descending(x: Tensor) -> Tensor:
    """Indices of each row's values, greatest first; of equal values the lowest index first."""
    return x.sort(dim=1, descending=True, stable=True).indices
