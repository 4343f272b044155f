"""SwiGLU times the router's probability, and its gradient, straight to FP8: custom ops.

C++ on CPU (`csrc/fp8.h`), Triton on CUDA (`fp8_swiglu_triton`).  Layouts and legend:
`fp8_reference`.  Nothing is rounded to bfloat16 between the arithmetic, float32, and the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern import _C
from r1kern.kernels.fp8_quantize import addresses, empty_codes


@torch.library.custom_op("r1kern::fp8_swiglu", mutates_args=(), device_types="cpu")
def swiglu_quantize(
    h: Tensor, probs: Tensor, offsets: Tensor, power_of_two: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """silu(gate) * up * prob, quantised: what `quantize` makes of it, [R, I].

    Args:
        h: float32 or bfloat16 [R, 2I], gate and up.
        probs: float32 [R].
        offsets: int64 [E + 1].
        columns: whether to write the column-wise codes and scales.
    """
    h, probs, offsets = h.contiguous(), probs.contiguous(), offsets.contiguous()
    R, I, E = len(h), h.shape[1] // 2, len(offsets) - 1  # noqa: E741
    codes = empty_codes(R, I, E, h.device, True, columns)
    _C.fp8_swiglu(
        *(h.itemsize, h.data_ptr(), probs.data_ptr(), R, I, offsets.data_ptr(), E, power_of_two),
        *(*addresses(codes), torch.get_num_threads()),
    )
    return codes


@swiglu_quantize.register_kernel("cuda")
def _(h, probs, offsets, power_of_two, columns):
    from r1kern.kernels import fp8_swiglu_triton

    return fp8_swiglu_triton.swiglu_quantize(h, probs, offsets, power_of_two, columns)


@swiglu_quantize.register_fake
def _(h, probs, offsets, power_of_two, columns):
    R, I2 = h.shape
    return empty_codes(R, I2 // 2, len(offsets) - 1, h.device, True, columns)


@torch.library.custom_op("r1kern::fp8_swiglu_backward", mutates_args=(), device_types="cpu")
def swiglu_backward_quantize(
    grad: Tensor, h: Tensor, probs: Tensor, offsets: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient [R, I] -> that of h, quantised as [R, 2I] both ways, and that of probs, float32 [R].

    Args:
        grad: float32 or bfloat16.
        h, probs, offsets: as in `swiglu_quantize`.
    """
    dtype = torch.promote_types(grad.dtype, h.dtype)
    grad, h = grad.to(dtype).contiguous(), h.to(dtype).contiguous()
    probs, offsets, E = probs.contiguous(), offsets.contiguous(), len(offsets) - 1
    codes = empty_codes(*h.shape, E, h.device, True, True)
    grad_probs = torch.zeros_like(probs)
    _C.fp8_swiglu_backward(
        *(h.itemsize, grad.data_ptr(), h.data_ptr(), probs.data_ptr(), *h.shape),
        *(offsets.data_ptr(), E, power_of_two, *addresses(codes), grad_probs.data_ptr()),
        torch.get_num_threads(),
    )
    return *codes, grad_probs


@swiglu_backward_quantize.register_kernel("cuda")
def _(grad, h, probs, offsets, power_of_two):
    from r1kern.kernels import fp8_swiglu_triton

    return fp8_swiglu_triton.swiglu_backward_quantize(grad, h, probs, offsets, power_of_two)


@swiglu_backward_quantize.register_fake
def _(grad, h, probs, offsets, power_of_two):
    codes = empty_codes(*h.shape, len(offsets) - 1, h.device, True, True)
    contiguous = torch.contiguous_format
    return *codes, torch.empty_like(probs, memory_format=contiguous)
