"""The FP8 codes that a model keeps, against its weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1kern import ops


def codes_of(model) -> Iterator[tuple[str, list[torch.nn.Parameter], object]]:
    """Name of the layer, weights and `fp8.Weights` of every product that is computed in FP8."""
    from r1kern.model.fp8_layers import FP8Experts

    for name, module in model.named_modules():
        if isinstance(module, FP8Experts):
            yield f"{name}.linear_fc1", module.linear_fc1.weights, module.fp8_fc1
            yield f"{name}.linear_fc2", module.linear_fc2.weights, module.fp8_fc2
        elif hasattr(module, "fp8"):
            yield name, [module.weight], module.fp8


def check_codes(model) -> int:
    """Asserts that the codes that are kept are those of the present weights; returns how many."""
    kept = 0
    for name, weights, fp8 in codes_of(model):
        if fp8.made is None:
            continue
        kept += 1
        fresh = ops.quantize_weights(weights, parts=fp8.parts, power_of_two=fp8.power_of_two)
        for mine, theirs in zip(fp8.made[:3], fresh[:3], strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name
    return kept
