"""The stream of weights for an FP8 generator: as DeepSeek-V3 is published, made anew each sync.

A bucket's bf16 tensors and their codes, half the size, are alive together until vLLM has copied
the bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from r1kern.errors import UserError
from r1kern.hf.fp8_blocks import SCALE, is_quantised, quantize, scale_shape


def check_device(device: str) -> None:
    """Raises UserError where vLLM has no kernels for weights in 128 x 128 blocks."""
    if device != "cuda":
        raise UserError(
            f"generator.fp8 needs CUDA, this process runs on {device}: set generator.fp8=false"
        )


def publish(bucket: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Replaces each tensor that is published in FP8 by its codes and its scales.

    Args:
        bucket: (name, tensor of any float dtype); a quantised one is [M, N].

    Returns:
        The others unchanged; for a quantised one `name` float8_e4m3fn [M, N] and
        `name + "_scale_inv"` float32 [ceil(M / 128), ceil(N / 128)].

    Raises:
        FloatingPointError: a weight is not finite; it is named.
    """
    published = []
    for name, tensor in bucket:
        if not is_quantised(name):
            published.append((name, tensor))
            continue
        try:
            codes, scales = quantize(tensor)
        except FloatingPointError as error:
            raise FloatingPointError(f"{name}: {error}") from error
        published += [(name, codes), (name + SCALE, scales)]
    return published


def published_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name and shape of what `publish` makes of tensors of these shapes, in its order."""
    published = {}
    for name, shape in shapes.items():
        published[name] = shape
        if is_quantised(name):
            published[name + SCALE] = scale_shape(shape)
    return published
