"""Rows of tokens to the layout sorted by expert and back: custom ops and their gradients.

C++ on CPU (`csrc/permute.h`), Triton on CUDA (`permute_triton`).

Shape legend: T tokens, H hidden, K experts per token, R rows of the permuted layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern import _C


@torch.library.custom_op("r1kern::permute", mutates_args=(), device_types="cpu")
def permute(x: Tensor, slots: Tensor, order: Tensor) -> Tensor:
    """rows[slots[t, k]] = x[t]; [T, H], int32 [T, K], [R] -> [R, H], 0 where no slot leads."""
    x, order = x.contiguous(), order.contiguous()
    rows = x.new_empty(len(order), x.shape[1])
    row_bytes = x.shape[1] * x.itemsize
    _C.permute(
        *(x.data_ptr(), order.data_ptr(), len(order), slots.shape[1], row_bytes, rows.data_ptr()),
        torch.get_num_threads(),
    )
    return rows


@permute.register_kernel("cuda")
def _(x, slots, order):
    from r1kern.kernels import permute_triton

    return permute_triton.permute(x, slots, len(order))


@permute.register_fake
def _(x, slots, order):
    return x.new_empty(len(order), x.shape[1])


@torch.library.custom_op("r1kern::unpermute", mutates_args=(), device_types="cpu")
def unpermute(rows: Tensor, slots: Tensor, order: Tensor, weights: Tensor | None) -> Tensor:
    """y[t] = sum_k weights[t, k] rows[slots[t, k]] (weights 1 if None), summed in float32."""
    H, (T, K) = rows.shape[1], slots.shape
    real = torch.promote_types(rows.dtype, torch.float32)
    x, slots = rows.to(real).contiguous(), slots.contiguous()
    w = None if weights is None else weights.to(real).contiguous()
    y = x.new_empty(T, H)
    _C.unpermute(
        *(x.itemsize, x.data_ptr(), slots.data_ptr(), 0 if w is None else w.data_ptr()),
        *(T, K, H, y.data_ptr(), torch.get_num_threads()),
    )
    return y.to(rows.dtype)


@unpermute.register_kernel("cuda")
def _(rows, slots, order, weights):
    from r1kern.kernels import permute_triton

    return permute_triton.unpermute(rows, slots, weights)


@unpermute.register_fake
def _(rows, slots, order, weights):
    return rows.new_empty(len(slots), rows.shape[1])


@torch.library.custom_op("r1kern::unpermute_backward", mutates_args=(), device_types="cpu")
def unpermute_backward(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_rows[slots[t, k]] = weights[t, k] grad[t]; grad_weights[t, k] = <grad[t], its row>."""
    H, (T, K) = rows.shape[1], slots.shape
    real = torch.promote_types(rows.dtype, torch.float32)
    grad, x, w = (t.to(real).contiguous() for t in (grad, rows, weights))
    slots = slots.contiguous()
    grad_rows = torch.empty_like(x) if len(x) == T * K else torch.zeros_like(x)
    grad_weights = torch.empty_like(w)
    _C.unpermute_backward(
        *(x.itemsize, grad.data_ptr(), x.data_ptr(), slots.data_ptr(), w.data_ptr(), T, K, H),
        *(grad_rows.data_ptr(), grad_weights.data_ptr(), torch.get_num_threads()),
    )
    return grad_rows.to(rows.dtype), grad_weights.to(weights.dtype)


@unpermute_backward.register_kernel("cuda")
def _(grad, rows, slots, weights):
    from r1kern.kernels import permute_triton

    return permute_triton.unpermute_backward(grad, rows, slots, weights)


@unpermute_backward.register_fake
def _(grad, rows, slots, weights):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(rows, memory_format=contiguous),
        torch.empty_like(weights, memory_format=contiguous),
    )


def _permute_setup(ctx, inputs, output) -> None:
    _, *layout = inputs
    ctx.save_for_backward(*layout)


def _permute_gradient(ctx, grad_rows):
    return unpermute(grad_rows, *ctx.saved_tensors, None), None, None


def _unpermute_setup(ctx, inputs, output) -> None:
    rows, slots, order, weights = inputs
    ctx.save_for_backward(slots, *((order,) if weights is None else (rows, weights)))


def _unpermute_gradient(ctx, grad):
    slots, *rest = ctx.saved_tensors
    if len(rest) == 1:
        return permute(grad, slots, *rest), None, None, None
    rows, weights = rest
    grad_rows, grad_weights = unpermute_backward(grad, rows, slots, weights)
    return grad_rows, None, None, grad_weights


permute.register_autograd(_permute_gradient, setup_context=_permute_setup)
unpermute.register_autograd(_unpermute_gradient, setup_context=_unpermute_setup)
