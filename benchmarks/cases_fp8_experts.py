"""The case of the whole expert block: fc1, SwiGLU times the router's probability, fc2, forward and
backward, the weights' gradients added to float32 ones, as a step of training does it.

The weights are quantised beforehand, once for all micro-batches of an optimizer's step.  A run
returns the result, the gradients of rows and probabilities, and the accumulated gradients: autograd
is called within it.

Shape legend: as in `cases_fp8`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kern.benchmarks.cases_common import (
    DTYPES,
    Case,
    Forward,
    Inputs,
    Prepared,
    Shape,
    Tensors,
    plainly,
)
from r1kern.benchmarks.cases_fp8 import (
    H,
    I,
    edge_spreads,
    groups,
    offsets_of,
    spread,
)
from r1kern.benchmarks.harness import Work
from r1kern.kernels import fp8_reference as reference
from r1kern.ops import fp8


class Block(NamedTuple):
    """The case's tensors: rows [R, H], probs [R], offsets [E + 1], the gradient of the result,
    weights, their accumulated gradients (float32), and the weights quantised: codes, transposed
    codes and scales of each."""

    rows: Tensor
    probs: Tensor
    offsets: Tensor
    grad: Tensor
    fc1: Tensor  # [E, 2I, H]
    fc2: Tensor  # [E, H, I]
    main1: Tensor
    main2: Tensor
    codes1: Tensor
    codes1_t: Tensor
    scales1: Tensor
    codes2: Tensor
    codes2_t: Tensor
    scales2: Tensor

    def quantized(self) -> tuple[fp8.QuantizedWeights, fp8.QuantizedWeights]:
        return fp8.QuantizedWeights(*self[8:11], 2), fp8.QuantizedWeights(*self[11:14], 1)


def experts_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    torch.manual_seed(seed)
    hidden, width, dtype = int(shape["H"]), int(shape["I"]), DTYPES[shape["dtype"]]
    R, E = sum(groups(shape)), len(groups(shape))

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device=device) * scale).to(dtype)

    fc1 = normal(E, 2 * width, hidden, scale=hidden**-0.5)
    fc2 = normal(E, hidden, width, scale=width**-0.5)
    codes = []
    for weights, parts in ((fc1, 2), (fc2, 1)):
        codes += fp8.quantize_weights(list(weights.unbind()), parts=parts)[:3]
    mains = (torch.randn_like(weights, dtype=torch.float32) for weights in (fc1, fc2))
    probs, offsets = torch.rand(R, device=device), offsets_of(shape, device)
    rows, grad = normal(R, hidden), normal(R, hidden)
    return Inputs(tuple(Block(rows, probs, offsets, grad, fc1, fc2, *mains, *codes)))


def _with_gradients(block: Block, forward: Callable[[Tensor, Tensor], Tensor]) -> Tensors:
    """The result, and what its gradient brings rows and probabilities."""
    rows, probs = (x.detach().requires_grad_() for x in (block.rows, block.probs))
    with torch.enable_grad():
        out = forward(rows, probs)
    return out.detach(), *torch.autograd.grad(out, (rows, probs), block.grad)


def our_experts(shape: Shape, tensors: Tensors) -> Tensors:
    block = Block(*tensors)
    weights = list(block.fc1.unbind()), list(block.fc2.unbind())
    grads = [*block.main1.unbind(), *block.main2.unbind()]

    def forward(rows: Tensor, probs: Tensor) -> Tensor:
        quantized = block.quantized()
        return fp8.fp8_experts(rows, probs, block.offsets, *weights, *quantized, grads=grads)

    return *_with_gradients(block, forward), block.main1, block.main2


def _accumulating(block: Block, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensors:
    """The block in the dtype of its rows, weights' gradients added to the float32 ones."""
    fc1, fc2 = (weight.detach().requires_grad_() for weight in (block.fc1, block.fc2))
    rows, probs = (x.detach().requires_grad_() for x in (block.rows, block.probs))
    with torch.enable_grad():
        gate, up = multiply(rows, fc1).chunk(2, dim=-1)
        a = (F.silu(gate) * up * probs[:, None]).to(rows.dtype)
        out = multiply(a, fc2)
    grads = torch.autograd.grad(out, (rows, probs, fc1, fc2), block.grad)
    for main, grad in zip((block.main1, block.main2), grads[2:], strict=True):
        main += grad
    return out.detach(), *grads[:2], block.main1, block.main2


def loop_experts(shape: Shape, tensors: Tensors) -> Tensors:
    """Our path without FP8, expert by expert as `model.moe.GroupedLinear` goes, SwiGLU in torch;
    the groups' sizes are on the host already."""
    counts = groups(shape)

    def multiply(x: Tensor, weights: Tensor) -> Tensor:
        runs = zip(x.split(counts), weights.unbind(), strict=True)
        return torch.cat([F.linear(run, weight) for run, weight in runs])

    return _accumulating(Block(*tensors), multiply)


def grouped_mm_experts(kind: str) -> Forward:
    """As `loop_experts` with `torch._grouped_mm`."""

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        block = Block(*tensors)
        ends = block.offsets[1:].int()
        return _accumulating(
            block, lambda x, weights: torch._grouped_mm(x, weights.transpose(1, 2), offs=ends)
        )

    return forward


def emulated_experts(shape: Shape, tensors: Tensors) -> Tensors:
    """The same FP8 training step of `fp8_reference`'s parts: how far FP8 is from the truth."""
    block, dtype = Block(*tensors), DTYPES[shape["dtype"]]

    def by_row_and_column(x: Tensor) -> tuple[Tensors, Tensors]:
        return reference.quantize_rows(x), reference.quantize_columns(x, block.offsets)

    def product(x: Tensors, codes: Tensor, scales: Tensor, *parts: int) -> Tensor:
        return reference.grouped_gemm(*x, codes, scales, block.offsets, *parts, dtype)

    x, x_columns = by_row_and_column(block.rows)
    h = product(x, block.codes1, block.scales1, 2, 1)
    a, a_columns = by_row_and_column(reference.swiglu(h, block.probs))
    out = product(a, block.codes2, block.scales2, 1, 1)
    grad, columns = by_row_and_column(block.grad)
    grad_a = product(grad, block.codes2_t, block.scales2.transpose(1, 2), 1, 1)
    reference.grouped_wgrad(*columns, *a_columns, block.offsets, list(block.main2.unbind()))
    grad_h, grad_probs = reference.swiglu_backward(grad_a, h, block.probs)
    grad, columns = by_row_and_column(grad_h)
    grad_rows = product(grad, block.codes1_t, block.scales1.transpose(1, 2), 1, 2)
    reference.grouped_wgrad(*columns, *x_columns, block.offsets, list(block.main1.unbind()))
    return out, grad_rows, grad_probs, block.main1, block.main2


def transformer_engine(kind: str) -> Prepared:
    """Two `GroupedLinear` by the recipe `Float8BlockScaling`, gradients accumulated in the product,
    weights quantised beforehand; the groups' sizes are on the host already."""
    if kind == "cpu":
        raise ImportError("has no kernel for a CPU")
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    def linear(weights: Tensor, mains: Tensor) -> torch.nn.Module:
        E, N, K = weights.shape
        made = te.GroupedLinear(
            E, K, N, bias=False, params_dtype=weights.dtype, fuse_wgrad_accumulation=True
        )
        for e in range(E):
            weight = getattr(made, f"weight{e}")
            weight.data = weights[e]
            weight.main_grad = mains[e]
        return made

    def bind(shape: Shape, tensors: Tensors) -> Callable[[], Tensors]:
        block, counts = Block(*tensors), groups(shape)
        fc1, fc2 = linear(block.fc1, block.main1), linear(block.fc2, block.main2)
        pad, unpad = te.Fp8Padding(len(counts)), te.Fp8Unpadding(len(counts))

        def once(first: bool = False) -> Tensors:
            def forward(rows: Tensor, probs: Tensor) -> Tensor:
                with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
                    x, padded = pad(rows, counts)
                    p, _ = pad(probs[:, None], counts)
                    gate, up = fc1(x, padded, is_first_microbatch=first).chunk(2, dim=-1)
                    a = (F.silu(gate) * up * p).to(x.dtype)
                    return unpad(fc2(a, padded, is_first_microbatch=first), counts)

            return *_with_gradients(block, forward), block.main1, block.main2

        mains = block.main1.clone(), block.main2.clone()
        once(first=True)  # quantises the weights
        block.main1.copy_(mains[0])
        block.main2.copy_(mains[1])
        return once

    return Prepared(bind)


def _work(shape: Shape) -> Work:
    """Six products; rows, result and their gradients, both layouts of the codes, and gradients
    read and written."""
    R, used = sum(groups(shape)), sum(n > 0 for n in groups(shape))
    weights = 3 * shape["H"] * shape["I"]
    rows = 4 * R * shape["H"] * DTYPES[shape["dtype"]].itemsize
    return Work(6 * R * weights, rows + (2 + 8) * used * weights)


def _fewer(shape: Shape) -> Shape:
    return shape | dict(T=min(int(shape["T"]), 64), EP=max(int(shape["EP"]), 32))


EXPERTS = Case(
    outputs=("result", "grad_rows", "grad_probs", "grad_fc1", "grad_fc2"),
    shapes={
        "cpu": [spread(256, 32, name, H=512, I=256, dtype="fp32") for name in ("balanced", "zipf")],
        "cuda": [
            spread(T, EP, routing, H=H, I=I, dtype="bf16")
            for T, EP, routing in (
                (4096, 64, "balanced"),
                (8192, 32, "balanced"),
                (16384, 16, "balanced"),
                (32768, 8, "balanced"),
                (4096, 64, "zipf"),
                (8192, 8, "zipf"),
                (4096, 64, "one-hot"),
            )
        ],
    },
    edges={
        kind: [
            one | dict(H=hidden, I=width, dtype=dtype)
            for one in edge_spreads(kind)
            for hidden, width, dtype in sizes
        ]
        for kind, sizes in (
            ("cpu", ((72, 40, "fp32"),)),
            ("cuda", ((256, 128, "fp32"), (1152, 384, "bf16"))),
        )
    },
    shrink=_fewer,
    inputs=experts_inputs,
    ours=our_experts,
    reference=emulated_experts,
    exact=loop_experts,
    margin=1.1,  # FP8's own error, and what other roundings of h tip over
    slack=2e-3,
    forgiven=0.1,
    work=_work,
    precision="fp8",
    baselines={
        "torch": plainly(loop_experts),
        "torch grouped_mm": grouped_mm_experts,
        "transformer-engine": transformer_engine,
    },
)
