"""Blockwise FP8 inside the model: codes of the weights, and counts of what FP8 lost.

The parameters stay as they are.  Their codes are made on first use and kept for all micro-batches
and passes until `forget`, which whoever writes weights calls.

Shape legend: E weights of one shape, N rows and K columns of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1kern import ops
from r1kern.config import Model
from r1kern.kernels.fp8_quantize import quantize
from r1kern.kernels.fp8_reference import BLOCK
from r1kern.ops.fp8 import lost


@dataclass(frozen=True)
class Precision:
    """What of a model is computed in FP8 beside the routed experts.

    Attributes:
        linears: those that DeepSeek-V3 publishes in FP8 (`hf.fp8_blocks.is_quantised`).
        power_of_two: scales are powers of two.
    """

    linears: bool = False
    power_of_two: bool = False

    @classmethod
    def of(cls, model: Model) -> Precision | None:
        """Of a model with these options; None without FP8."""
        if model.precision == "dtype":
            return None
        return cls(model.fp8_linears, model.fp8_scales == "power_of_two")


class Weights:
    """The FP8 side of one or several weights of a module.

    Args:
        precision: of the model.
        parts: matrices in each weight, one upon the other (gate and up).
    """

    def __init__(self, precision: Precision, parts: int = 1):
        self.power_of_two, self.parts = precision.power_of_two, parts
        self.made: ops.QuantizedWeights | None = None
        self.counts: torch.Tensor | None = None  # int64 [3]: values, lost to 0, NaN
        self.counting = False
        self.whole_blocks = torch.cuda.is_available()  # what the kernels of the device take

    def of(self, weights: Sequence[torch.Tensor], trained: bool) -> ops.QuantizedWeights:
        """The codes of `weights`, E of [N, K]; transposed too where they are trained."""
        if self.made is None:
            self.made = ops.quantize_weights(
                weights, parts=self.parts, power_of_two=self.power_of_two, transposed=trained
            )
        return self.made

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], see `ops.fp8_linear`."""
        rows, trained = len(weight), weight.requires_grad
        if self.whole_blocks and rows % BLOCK:  # in V3 the 576 of kv_a_proj_with_mqa alone
            weight = F.pad(weight, (0, 0, 0, -rows % BLOCK))
        grads = main_grads([weight])  # None where padded: its gradient takes autograd's way
        out = ops.fp8_linear(
            x,
            weight,
            self.of([weight], trained),
            power_of_two=self.power_of_two,
            grad=grads and grads[0],
        )[..., :rows]
        self.count([weight], x, out)
        return out

    def count(self, weights: Sequence[torch.Tensor], x=None, out=None) -> None:
        """Count what FP8 lost of the weights, of input `x`, and of the gradient of output `out`.

        Once after `start_counting`, in a pass with a gradient.
        """
        if not (self.counting and torch.is_grad_enabled()):
            return
        self.counting = False
        self.counts = torch.zeros(3, dtype=torch.int64, device=weights[0].device)
        for weight, codes in zip(weights, self.made.codes, strict=True):
            self._add(weight, codes)
        if x is not None:
            self._add(x)
            out.register_hook(self._add)

    @torch.no_grad()
    def _add(self, values, codes=None) -> None:
        if codes is None:
            values = values.flatten(0, -2)
            offsets = torch.tensor([0, len(values)]).to(values.device, non_blocking=True)
            codes = quantize(values, offsets, self.power_of_two, True, False)[0]
        self.counts[0] += values.numel()
        self.counts[1:] += lost(values, codes)


def main_grads(weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Megatron's float32 buffers, if there are any, to which backward is to add gradients."""
    if not torch.is_grad_enabled() or not hasattr(weights[0], "main_grad"):
        return None
    for weight in weights:
        weight.grad_added_to_main_grad = True  # its hook then leaves autograd's tensor alone
    return [weight.main_grad for weight in weights]


def forget(model: torch.nn.Module) -> None:
    """The weights were written: their codes are not theirs any more."""
    for weights in _all(model):
        weights.made = None


def codes_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights' codes and scales that are kept at this moment."""
    made = [weights.made for weights in _all(model) if weights.made is not None]
    return sum(x.nbytes for m in made for x in (m.codes, m.codes_t, m.scales))


def start_counting(model: torch.nn.Module) -> None:
    """Count what FP8 loses in the first micro-batch with a gradient."""
    for weights in _all(model):
        weights.counting, weights.counts = True, None


def finish_counting(model: torch.nn.Module) -> dict[str, float]:
    """What FP8 lost in the micro-batch counted, over all ranks.  Collective.

    Of inputs, weights and gradients of outputs of every FP8 module; what is quantised within the
    expert block (the activation and its gradient) is not looked at.

    Returns:
        "fp8_underflow", the share of values that became 0, and "fp8_nan", the number of codes NaN;
        nothing for a model without FP8.
    """
    if model.config.fp8_blockwise is None:
        return {}
    total = torch.zeros(3, dtype=torch.int64, device=next(model.parameters()).device)
    for weights in _all(model):
        if weights.counts is not None:
            total += weights.counts
    dist.all_reduce(total)
    values, underflow, nan = total.tolist()
    return {"fp8_underflow": underflow / max(values, 1), "fp8_nan": float(nan)}


def _all(model: torch.nn.Module) -> list[Weights]:
    found = (value for module in model.modules() for value in vars(module).values())
    return [value for value in found if isinstance(value, Weights)]
