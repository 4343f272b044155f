"""The stream of weights for an FP8 generator: as DeepSeek-V3 is published, made anew each sync.

A bucket's bf16 tensors and their codes, half the size, are alive together until vLLM has copied
the bucket.  The trainer's FP8 products use the same quantiser (`ops.quantize_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from r1kern.hf.fp8_blocks import SCALE, dequantize, is_quantised, quantize, scale_shape

Bucket = Iterable[tuple[str, torch.Tensor]]


def publish(bucket: Bucket, *, power_of_two: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Replaces each tensor that is published in FP8 by its codes and its scales.

    Args:
        bucket: (name, tensor of any float dtype); a quantised one is [M, N].
        power_of_two: scales are powers of two, as the trainer's (`model.fp8_scales`).

    Returns:
        The others unchanged; for a quantised one `name` float8_e4m3fn [M, N] and
        `name + "_scale_inv"` float32 [ceil(M / 128), ceil(N / 128)].

    Raises:
        FloatingPointError: a weight is not finite; it is named.
    """
    published = []
    for name, tensor in bucket:
        if is_quantised(name):
            codes, scales = _quantized(name, tensor, power_of_two)
            published += [(name, codes), (name + SCALE, scales)]
        else:
            published.append((name, tensor))
    return published


def emulate(bucket: Bucket, *, power_of_two: bool = False) -> list[tuple[str, torch.Tensor]]:
    """`publish` for a generator without FP8 kernels: the values of codes and scales, multiplied.

    In float32 they are the weights that the trainer's FP8 products multiply by.

    Returns:
        The names and dtypes of `bucket`.
    """
    sent = []
    for name, tensor in bucket:
        if is_quantised(name):
            codes, scales = _quantized(name, tensor, power_of_two)
            tensor = torch.empty_like(tensor)
            dequantize(codes, scales, tensor)
        sent.append((name, tensor))
    return sent


def _quantized(name: str, tensor: torch.Tensor, power_of_two: bool):
    try:
        return quantize(tensor, power_of_two=power_of_two)
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}: {error}") from error


def published_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name and shape of what `publish` makes of tensors of these shapes, in its order."""
    published = {}
    for name, shape in shapes.items():
        published[name] = shape
        if is_quantised(name):
            published[name + SCALE] = scale_shape(shape)
    return published
