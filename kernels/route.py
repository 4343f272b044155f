"""DeepSeek-V3's router: the custom op and its gradient.

One launch gives the choice, the weights and all that the permutation needs.  C++ on CPU
(`csrc/route.h`), Triton on CUDA (`route_triton`).

Shape legend: T tokens, E experts, K experts per token, R rows of the permuted layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern import _C


def capacity(T: int, K: int, E: int, align: int) -> int:
    """Rows that hold T * K choices however they fall, each expert's padded to `align`: R."""
    return (T * K + E * (align - 1)) // align * align


@torch.library.custom_op("r1kern::route", mutates_args=(), device_types="cpu")
def route(
    logits: Tensor,
    bias: Tensor,
    num_groups: int,
    topk_groups: int,
    topk: int,
    scale: float,
    normalize: bool,
    align: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, indices, counts, offsets, slots, order, score sums; see `r1kern.ops.Routing`."""
    T, E = logits.shape
    out = _outputs(logits, topk, align)
    x = logits.to(out[0].dtype).contiguous()
    b = bias.to(out[0].dtype).contiguous()
    _C.route(
        *(x.itemsize, x.data_ptr(), b.data_ptr(), T, E, num_groups, topk_groups, topk),
        *(len(out[5]), align, scale, normalize),
        *(tensor.data_ptr() for tensor in out),
        torch.get_num_threads(),
    )
    return out


@route.register_kernel("cuda")
def _(logits, bias, num_groups, topk_groups, topk, scale, normalize, align):
    from r1kern.kernels import route_triton

    return route_triton.route(logits, bias, num_groups, topk_groups, topk, scale, normalize, align)


def _outputs(logits: Tensor, K: int, align: int) -> tuple[Tensor, ...]:
    T, E = logits.shape
    weights = logits.new_empty((T, K), dtype=torch.promote_types(logits.dtype, torch.float32))
    indices = torch.empty_like(weights, dtype=torch.int64)
    slots = torch.empty_like(weights, dtype=torch.int32)
    order = slots.new_empty(capacity(T, K, E, align))
    return (
        weights,
        indices,
        indices.new_empty(E),
        indices.new_empty(E + 1),
        slots,
        order,
        weights.new_empty(E),
    )


@route.register_fake
def _(logits, bias, num_groups, topk_groups, topk, scale, normalize, align):
    return _outputs(logits, topk, align)


@torch.library.custom_op("r1kern::route_backward", mutates_args=(), device_types="cpu")
def route_backward(
    logits: Tensor,
    indices: Tensor,
    grad_weights: Tensor | None,
    grad_sums: Tensor | None,
    scale: float,
    normalize: bool,
) -> Tensor:
    """Through the weights K entries of a row have a gradient, through the score sums all have."""
    real = torch.promote_types(logits.dtype, torch.float32)
    if grad_sums is None:
        grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    else:
        s = logits.to(real).sigmoid()
        total = s.sum(1, keepdim=True)
        by_score = (grad_sums - (s @ grad_sums)[:, None] / total) / total
        grad = (by_score * s * (1 - s)).to(logits.dtype)
    if grad_weights is not None:
        s = logits.gather(1, indices).to(real).sigmoid()
        by_score = grad_weights * scale
        if normalize:
            total = s.sum(1, keepdim=True) + 1e-20
            by_score = (by_score - (by_score * s).sum(1, keepdim=True) / total) / total
        grad.scatter_add_(1, indices, (by_score * s * (1 - s)).to(logits.dtype))
    return grad


@route_backward.register_kernel("cuda")
def _(logits, indices, grad_weights, grad_sums, scale, normalize):
    from r1kern.kernels import route_triton

    return route_triton.route_backward(logits, indices, grad_weights, grad_sums, scale, normalize)


@route_backward.register_fake
def _(logits, indices, grad_weights, grad_sums, scale, normalize):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    logits, _, _, _, _, ctx.scale, ctx.normalize, _ = inputs
    _, indices, counts, offsets, slots, order, _ = output
    ctx.mark_non_differentiable(indices, counts, offsets, slots, order)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, indices)


def _gradient(ctx, grad_weights, _indices, _counts, _offsets, _slots, _order, grad_sums):
    if grad_weights is None and grad_sums is None:
        return (None,) * 8
    grad = route_backward(*ctx.saved_tensors, grad_weights, grad_sums, ctx.scale, ctx.normalize)
    return grad, *[None] * 7


route.register_autograd(_gradient, setup_context=_setup)
