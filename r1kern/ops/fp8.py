"""Matrix products in blockwise FP8, forward and backward, as DeepSeek-V3 trained (arXiv 2412.19437,
section 3.3): e4m3 for all three products, activations and gradients in tiles of 1 x 128, weights in
blocks of 128 x 128, float32 scales, sums promoted to float32 every 128 of the reduction.

Where it differs from the paper: no E5M6 for the inputs of attention's linears; scales are powers of
two only on demand (`power_of_two`), and then of all tensors.

Shape legend: T tokens, R rows sorted by expert (ragged, no padding), E experts, H hidden, I width
of an expert, N rows and K columns of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r1kern.errors import UserError
from r1kern.kernels.fp8_gemm import grouped_gemm, grouped_wgrad
from r1kern.kernels.fp8_quantize import quantize
from r1kern.kernels.fp8_quantize import quantize_weights as _quantize_weights
from r1kern.kernels.fp8_swiglu import swiglu_backward_quantize, swiglu_quantize
from r1kern.ops import _check as check

DTYPES = (torch.float32, torch.bfloat16)


class QuantizedWeights(NamedTuple):
    """Weights of one shape, quantised once for all products with them.

    Attributes:
        codes: e4m3 [E, N, K].
        codes_t: the same [E, K, N], for the gradient of the input; empty where not asked for.
        scales: float32 [E, NB, KB], the factor that restores each block (`weight_scale_inv`).
        parts: matrices in each weight, one upon the other, that have blocks of their own.
    """

    codes: Tensor
    codes_t: Tensor
    scales: Tensor
    parts: int


def quantize_weights(
    weights: Sequence[Tensor],
    *,
    parts: int = 1,
    power_of_two: bool = False,
    transposed: bool = True,
) -> QuantizedWeights:
    """Weights to e4m3 codes and float32 scales of blocks of 128 x 128, in one read.

    Args:
        weights: E of [N, K], float32 or bfloat16.
        parts: 2 for gate and up in one weight: blocks start anew in each, as they are published.
        power_of_two: round scales up to powers of two.
        transposed: write the codes in both layouts.

    Raises:
        UserError: shapes or dtypes that do not fit.
    """
    N, K = weights[0].shape if weights and weights[0].dim() == 2 else (0, 0)
    for weight in weights:
        if weight.shape != (N, K) or weight.dtype not in DTYPES:
            raise UserError(
                f"weights must be float32 or bfloat16 of one shape [N, K], got "
                f"{check.describe(weight)}"
            )
    if parts < 1 or N % parts or not N:
        raise UserError(f"parts must divide the {N} rows of the weights, got {parts}")
    weights = [weight.detach() for weight in weights]
    return QuantizedWeights(*_quantize_weights(weights, parts, power_of_two, transposed), parts)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    quantized: QuantizedWeights,
    *,
    power_of_two: bool = False,
    grad: Tensor | None = None,
) -> Tensor:
    """x @ weight.T in FP8; differentiable in `x` and `weight`.

    Args:
        x: float32 or bfloat16 [..., K].
        weight: [N, K]; only its gradient is looked at.
        quantized: `quantize_weights([weight])`, with transposed codes where a gradient is wanted.
        power_of_two: of the scales of `x` and of the gradients.
        grad: float32 [N, K] to which backward adds the weight's gradient; autograd then brings the
            weight a tensor without meaning (Megatron's `grad_added_to_main_grad`).

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        UserError: shapes or dtypes that do not fit.
    """
    _fits("x", x, weight)
    rows = x.flatten(0, -2)
    offsets = torch.tensor([0, len(rows)]).to(x.device, non_blocking=True)
    out = _Linear.apply(
        rows, weight, offsets, quantized, power_of_two, grad, torch.is_grad_enabled()
    )
    return out.unflatten(0, x.shape[:-1])


def fp8_experts(
    rows: Tensor,
    probs: Tensor,
    offsets: Tensor,
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
    quantized1: QuantizedWeights,
    quantized2: QuantizedWeights,
    *,
    power_of_two: bool = False,
    grads: Sequence[Tensor] | None = None,
) -> Tensor:
    """fc2(silu(gate) * up * prob), (gate, up) = fc1(row), each row by its expert, in FP8.

    Differentiable in `rows`, `probs` and the weights.  Kept for backward: rows and activations by
    columns in FP8, the product of fc1 in the dtype of `rows`.

    Args:
        rows: float32 or bfloat16 [R, H], sorted by expert.
        probs: float32 [R], the router's.
        offsets: int64 [E + 1] on the device of `rows`, first row of each expert, and R.
        fc1, fc2: E of [2I, H] (gate, up) and of [H, I]; only their gradients are looked at.
        quantized1, quantized2: of them, the first in two parts.
        power_of_two: of the scales of activations and gradients.
        grads: float32, of the shapes of fc1 and then of fc2, to which backward adds their
            gradients; autograd then brings the weights tensors without meaning.

    Returns:
        [R, H] in the dtype of `rows`.

    Raises:
        UserError: shapes or dtypes that do not fit.
    """
    _fits("rows", rows, fc1[0])
    if rows.dim() != 2 or probs.shape != rows.shape[:1] or probs.dtype != torch.float32:
        raise UserError(
            f"rows must be [R, H] and probs float32 [R], got {check.describe(rows)} and "
            f"{check.describe(probs)}"
        )
    E, (width, H) = len(fc1), fc1[0].shape
    if len(fc2) != E or fc2[0].shape != (H, width // 2) or quantized1.parts != 2:
        raise UserError(
            f"fc1 must be E of [2I, H] quantised in 2 parts and fc2 E of [H, I], got {E} of "
            f"{[width, H]} in {quantized1.parts} and {len(fc2)} of {list(fc2[0].shape)}"
        )
    if offsets.shape != (E + 1,) or offsets.dtype != torch.int64:
        raise UserError(f"offsets must be int64 [{E + 1}], got {check.describe(offsets)}")
    check.one_device(rows=rows, probs=probs, offsets=offsets, fc1=fc1[0], fc2=fc2[0])
    weights = quantized1, quantized2
    options = power_of_two, grads, torch.is_grad_enabled()
    return _Experts.apply(rows, probs, offsets, weights, *options, *fc1, *fc2)


def lost(x: Tensor, codes: Tensor) -> Tensor:
    """int64 [2]: values of `x` other than 0 whose code is 0, and codes that are NaN.

    Args:
        x: what was quantised.
        codes: e4m3 of the same shape.
    """
    codes = codes.float()
    return torch.stack([((codes == 0) & (x != 0)).sum(), codes.isnan().sum()])


def _fits(name: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() < 2 or x.dtype not in DTYPES or x.shape[-1] != weight.shape[-1]:
        raise UserError(
            f"{name} must be float32 or bfloat16 [..., {weight.shape[-1]}], got {check.describe(x)}"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets, quantized, power_of_two, grad, differentiable):
        codes, scales, *columns = quantize(x, offsets, power_of_two, True, differentiable)
        if differentiable:
            ctx.save_for_backward(weight, offsets, *columns)
            ctx.quantized, ctx.power_of_two, ctx.grad = quantized, power_of_two, grad
        return _product(codes, scales, quantized, offsets, x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        weight, offsets, *x_columns = ctx.saved_tensors
        codes, scales, *columns = quantize(grad_y, offsets, ctx.power_of_two, True, True)
        grad_x = _product_t(codes, scales, ctx.quantized, offsets, grad_y.dtype)
        (grad,) = _weight_grads(
            [weight], columns, x_columns, offsets, None if ctx.grad is None else [ctx.grad]
        )
        return grad_x, grad, None, None, None, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, probs, offsets, quantized, power_of_two, grads, differentiable, *w):
        fc1, fc2 = quantized
        codes, scales, *x_columns = quantize(rows, offsets, power_of_two, True, differentiable)
        h = _product(codes, scales, fc1, offsets, rows.dtype)
        codes, scales, *a_columns = swiglu_quantize(h, probs, offsets, power_of_two, differentiable)
        if differentiable:
            ctx.save_for_backward(probs, offsets, h, *x_columns, *a_columns, *w)
            ctx.quantized, ctx.power_of_two, ctx.grads = quantized, power_of_two, grads
        return _product(codes, scales, fc2, offsets, rows.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        probs, offsets, h, x_codes, x_scales, a_codes, a_scales, *w = ctx.saved_tensors
        (fc1, fc2), E = ctx.quantized, len(w) // 2
        grads1, grads2 = (None, None) if ctx.grads is None else (ctx.grads[:E], ctx.grads[E:])
        codes, scales, *columns = quantize(grad_y, offsets, ctx.power_of_two, True, True)
        grad_a = _product_t(codes, scales, fc2, offsets, h.dtype)
        grad_fc2 = _weight_grads(w[E:], columns, (a_codes, a_scales), offsets, grads2)
        codes, scales, *columns, grad_probs = swiglu_backward_quantize(
            grad_a, h, probs, offsets, ctx.power_of_two
        )
        grad_rows = _product_t(codes, scales, fc1, offsets, grad_y.dtype)
        grad_fc1 = _weight_grads(w[:E], columns, (x_codes, x_scales), offsets, grads1)
        return grad_rows, grad_probs, *[None] * 5, *grad_fc1, *grad_fc2


def _product(codes, scales, weights: QuantizedWeights, offsets, dtype) -> Tensor:
    """[R, K] -> [R, N]."""
    b = weights.codes, weights.scales
    return grouped_gemm(codes, scales, *b, offsets, weights.parts, 1, dtype)


def _product_t(codes, scales, weights: QuantizedWeights, offsets, dtype) -> Tensor:
    """[R, N] -> [R, K], by the transposed weights."""
    b = weights.codes_t, weights.scales.transpose(1, 2)
    return grouped_gemm(codes, scales, *b, offsets, 1, weights.parts, dtype)


def _weight_grads(weights, columns, input_columns, offsets, grads) -> list[Tensor]:
    """What autograd is to bring the weights; the true gradients where `grads` is None."""
    if grads is not None:
        grouped_wgrad(*columns, *input_columns, offsets, list(grads))
        unread = torch.empty_like(weights[0])  # one for all: E of them are the weights' bytes again
        return [unread.detach() for _ in weights]
    like = weights[0]
    whole = torch.zeros(len(weights), *like.shape, dtype=torch.float32, device=like.device)
    grads = list(whole.unbind())
    grouped_wgrad(*columns, *input_columns, offsets, grads)
    return [grad.to(like.dtype) for grad in grads]
