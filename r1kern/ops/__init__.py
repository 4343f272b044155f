"""The public fused ops: plain tensors in, plain tensors out.

`torch.library` dispatches them by device: each custom op (in `r1kern.kernels`) has a CPU kernel
(C++ between torch's matrix products), a CUDA kernel (Triton; of the FP8 products CUDA C++ too), a
fake kernel (FakeTensor, torch.compile, dry runs) and an autograd formula, which for FP8 is that of
the whole block (`ops.fp8`).  `r1kern.kernels.reference` and `fp8_reference` say the same things
naively and are the truth they are tested against.

Every function raises `UserError` (a `ValueError`) of one line for arguments that do not fit.
"""

from r1kern.ops.fp8 import QuantizedWeights, fp8_experts, fp8_linear, quantize_weights
from r1kern.ops.head import linear_grpo_loss, linear_gspo_loss, linear_logprob
from r1kern.ops.loss import group_advantage, grpo_loss, zero_variance
from r1kern.ops.routing import Permutation, Routing, permute, reroute, route, unpermute

__all__ = [
    "Permutation",
    "QuantizedWeights",
    "Routing",
    "fp8_experts",
    "fp8_linear",
    "group_advantage",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_gspo_loss",
    "linear_logprob",
    "permute",
    "quantize_weights",
    "reroute",
    "route",
    "unpermute",
    "zero_variance",
]
