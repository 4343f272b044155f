"""Cases of the FP8 products: dense, grouped (forward and gradient of the input) and wgrad.

The products of DeepSeek-V3's experts, by name: "fc1" [R, H] x [2I, H], "fc2" [R, I] x [H, I],
"dgrad1" and "dgrad2" the gradients of their inputs, by the transposed weights.  All operands are
quantised beforehand.  The cases "_triton" and "_hopper" (CUDA C++) call one implementation.

Shape legend: as in `cases_fp8`; M, N, K of a dense product.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kern.benchmarks import fp8_rivals
from r1kern.benchmarks.cases_common import (
    DTYPES,
    Case,
    Forward,
    Inputs,
    Shape,
    Tensors,
    label,
    plainly,
)
from r1kern.benchmarks.cases_fp8 import (
    H,
    I,
    edge_spreads,
    fewer_tokens,
    groups,
    offsets_of,
    spread,
)
from r1kern.benchmarks.harness import Work
from r1kern.kernels import fp8_gemm
from r1kern.kernels import fp8_reference as reference

IMPLEMENTATION = "r1kern.kernels.fp8_gemm_"  # and its name: the module of the launchers


def sizes(shape: Shape) -> tuple[list[int], int, int]:
    """Rows of each group, N and K of the product."""
    if "M" in shape:
        return [int(shape["M"])], int(shape["N"]), int(shape["K"])
    hidden, width = int(shape["H"]), int(shape["I"])
    N, K = {
        "fc1": (2 * width, hidden),
        "fc2": (hidden, width),
        "dgrad1": (hidden, 2 * width),
        "dgrad2": (width, hidden),
    }[str(shape["product"])]
    return groups(shape), N, K


def parts(shape: Shape) -> tuple[int, int]:
    """Parts of N and of K in which the weight's blocks start anew: gate and up are two."""
    product = shape.get("product")
    return 1 + (product == "fc1"), 1 + (product == "dgrad1")


def gemm_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """a [R, K] and its scales, b [E, N, K] and its scales, offsets; a and b again, for rivals, in
    the dtype of the result."""
    torch.manual_seed(seed)
    counts, N, K = sizes(shape)
    dtype, (n_parts, k_parts) = DTYPES[shape["dtype"]], parts(shape)
    x = torch.randn(sum(counts), K, device=device).to(dtype)
    a, a_scales = reference.quantize_rows(x)
    x = reference.dequantize_rows(a, a_scales).to(dtype)
    made, wide = [], torch.empty(len(counts), N, K, dtype=dtype, device=device)
    for plain in wide:
        size = (K, N) if k_parts == 2 else (N, K)
        weight = torch.randn(size, device=device) / K**0.5
        codes, scales = reference.quantize_weight(weight, max(n_parts, k_parts))
        if k_parts == 2:
            codes, scales = codes.t().contiguous(), scales.t()
        plain.copy_(reference.dequantize_weight(codes, scales, n_parts, k_parts))
        made.append((codes, scales))
    b, b_scales = (torch.stack(tensors) for tensors in zip(*made, strict=True))
    offsets = torch.tensor([0, *counts], device=device).cumsum(0)
    return Inputs((a, a_scales, b, b_scales, offsets, x, wide))


def _dtype(shape: Shape, codes: Tensor) -> torch.dtype:
    """Of the product; the truth, whose operands come in float64, is not rounded to bfloat16."""
    return torch.float32 if codes.dtype == torch.float64 else DTYPES[shape["dtype"]]


def our_gemm(shape: Shape, tensors: Tensors) -> Tensors:
    *operands, _, _ = tensors
    return (fp8_gemm.grouped_gemm(*operands, *parts(shape), _dtype(shape, tensors[0])),)


def plain_gemm(shape: Shape, tensors: Tensors) -> Tensors:
    *operands, _, _ = tensors
    return (reference.grouped_gemm(*operands, *parts(shape), _dtype(shape, tensors[0])),)


def wide_gemm(shape: Shape, tensors: Tensors) -> Tensors:
    """The product in bfloat16, expert by expert."""
    *_, x, wide = tensors
    runs = x.split(sizes(shape)[0])
    return (torch.cat([F.linear(run, weight) for run, weight in zip(runs, wide, strict=True)]),)


def gemm_of(implementation: str) -> Forward:
    """The launcher of one implementation."""

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        *operands, _, _ = tensors
        out = tensors[0].new_empty(len(tensors[0]), sizes(shape)[1], dtype=DTYPES[shape["dtype"]])
        if out.numel():
            importlib.import_module(IMPLEMENTATION + implementation).grouped_gemm(*operands, out)
        return (out,)

    return forward


def _gemm_work(shape: Shape) -> Work:
    counts, N, K = sizes(shape)
    R, used = sum(counts), sum(n > 0 for n in counts)
    out = R * N * DTYPES[shape["dtype"]].itemsize
    return Work(2 * R * N * K, R * K + used * N * K + out)


def _fewer(shape: Shape) -> Shape:
    return shape | dict(M=min(int(shape["M"]), 512)) if "M" in shape else fewer_tokens(shape)


def _dense(M: int, N: int, K: int, dtype: str = "bf16") -> Shape:
    return dict(M=M, N=N, K=K, dtype=dtype)


def _grouped(T: int, EP: int, routing: str, product: str) -> Shape:
    return spread(T, EP, routing, H=H, I=I, product=product, dtype="bf16")


DENSE = [_dense(4096, 7168, 16384), _dense(8192, 4096, 7168)]
GROUPED = [
    *(_grouped(4096, 64, "balanced", name) for name in ("fc1", "fc2", "dgrad1", "dgrad2")),
    _grouped(4096, 8, "balanced", "fc1"),
    _grouped(4096, 64, "zipf", "fc1"),
    _grouped(4096, 8, "zipf", "fc2"),
    _grouped(4096, 64, "one-hot", "fc1"),
    _grouped(16384, 16, "balanced", "fc1"),
    _grouped(32768, 32, "balanced", "fc1"),
]
# DeepGEMM's best TFLOP/s by its authors, on an H800.
PUBLISHED = {label(DENSE[0]): 1550, label(GROUPED[0]): 1381, label(GROUPED[1]): 1262}
PUBLISHED_WGRAD = "900 to 1092"

GROUPED_EDGES = {
    kind: [
        one | dict(H=hidden, I=width, product=product, dtype=dtype)
        for one in edge_spreads(kind)
        for hidden, width, product, dtype in options
    ]
    for kind, options in (
        ("cpu", ((72, 40, "fc1", "fp32"), (136, 128, "dgrad1", "bf16"))),
        (
            "cuda",
            (
                (256, 128, "fc1", "bf16"),
                (1152, 384, "dgrad1", "fp32"),
                (384, 640, "fc2", "bf16"),
                (7168, 2048, "dgrad2", "bf16"),
            ),
        ),
    )
}

GEMM = Case(
    outputs=("product",),
    shapes={"cpu": [_dense(256, 512, 768, "fp32")], "cuda": DENSE},
    edges={
        "cpu": [_dense(1, 72, 200, "bf16")],
        "cuda": [_dense(*size) for size in ((1, 128, 128), (129, 384, 1152), (4096, 1536, 7168))],
    },
    shrink=_fewer,
    inputs=gemm_inputs,
    ours=our_gemm,
    reference=plain_gemm,
    slack=2**-9,  # Hopper sums e4m3 products with some 14 bits (arXiv 2412.19437, section 3.3.2)
    work=_gemm_work,
    precision="fp8",
    published={shape: f"{rate} TFLOP/s" for shape, rate in PUBLISHED.items()},
    baselines={
        "torch": plainly(wide_gemm),
        "torch scaled_mm 1x128": fp8_rivals.scaled_mm_blocks,
        "torch scaled_mm rows": fp8_rivals.scaled_mm_rows,
        "deepgemm": fp8_rivals.deep_gemm_dense,
    },
)

GROUPED_GEMM = replace(
    GEMM,
    shapes={
        "cpu": [spread(256, 32, "zipf", H=512, I=256, product="fc1", dtype="fp32")],
        "cuda": GROUPED,
    },
    edges=GROUPED_EDGES,
    baselines={
        "torch": plainly(wide_gemm),
        "torch grouped_mm": fp8_rivals.grouped_mm,
        "torch scaled_grouped_mm rows": fp8_rivals.scaled_grouped_mm,
        "deepgemm": fp8_rivals.deep_gemm_grouped,
        "deepgemm + layout": fp8_rivals.deep_gemm_with_layout,
    },
)


def one_implementation(case: Case, forward: Forward, op: Forward, shapes: list[Shape]) -> Case:
    """The case with one implementation in the place of the op, on CUDA only, beside the op."""
    return replace(
        case,
        ours=forward,
        shapes={"cpu": [], "cuda": shapes},
        edges={"cpu": [], "cuda": case.edges["cuda"]},
        baselines={"op": plainly(op)},
    )


GEMM_TRITON, GEMM_HOPPER = (
    one_implementation(GROUPED_GEMM, gemm_of(name), our_gemm, [DENSE[0], *GROUPED[:6]])
    for name in ("triton", "hopper")
)


# ----------------------------------------------------------------------------------------- wgrad


def wgrad_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """The output's gradient by columns [N, P] and its scales, the input's [K, P] and scales,
    offsets, the gradients [E, N, K] that are added to; for rivals, both operands by rows."""
    torch.manual_seed(seed)
    counts, N, K = sizes(shape)
    dtype, offsets = DTYPES[shape["dtype"]], offsets_of(shape, device)
    operands, wide = [], []
    for width in (N, K):
        x = torch.randn(sum(counts), width, device=device).to(dtype)
        codes, scales = reference.quantize_columns(x, offsets)
        operands += [codes, scales]
        columns = reference.dequantize_columns(codes, scales).to(dtype)
        first = reference.padded_offsets(offsets).tolist()
        kept = [columns[:, i : i + n] for i, n in zip(first, counts, strict=False)]
        wide.append(torch.cat(kept, 1).t().contiguous())
    grads = torch.randn(len(counts), N, K, device=device)
    return Inputs((*operands, offsets, grads, *wide))


def our_wgrad(shape: Shape, tensors: Tensors) -> Tensors:
    *operands, grads, _, _ = tensors
    fp8_gemm.grouped_wgrad(*operands, list(grads.unbind()))
    return (grads,)


def plain_wgrad(shape: Shape, tensors: Tensors) -> Tensors:
    *operands, grads, _, _ = tensors
    reference.grouped_wgrad(*operands, list(grads.unbind()))
    return (grads,)


def wide_wgrad(shape: Shape, tensors: Tensors) -> Tensors:
    """In bfloat16, expert by expert, each added to the float32 gradient."""
    *_, grads, grad_y, x = tensors
    counts = sizes(shape)[0]
    for grad, left, right in zip(grads, grad_y.split(counts), x.split(counts), strict=True):
        grad += left.t() @ right
    return (grads,)


def wgrad_of(implementation: str) -> Forward:
    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        *operands, grads, _, _ = tensors
        module = importlib.import_module(IMPLEMENTATION + implementation)
        E, N, K = grads.shape
        table = grads.data_ptr() + torch.arange(E, device=grads.device) * (4 * N * K)
        module.grouped_wgrad(*operands, table, N, K)
        return (grads,)

    return forward


def _wgrad_work(shape: Shape) -> Work:
    counts, N, K = sizes(shape)
    R, used = sum(counts), sum(n > 0 for n in counts)
    return Work(2 * R * N * K, R * (N + K) + 8 * used * N * K)


WGRADS = [
    *(_grouped(4096, 64, "balanced", name) for name in ("fc1", "fc2")),
    _grouped(4096, 8, "balanced", "fc1"),
    _grouped(4096, 64, "zipf", "fc1"),
    _grouped(4096, 64, "one-hot", "fc2"),
    _grouped(16384, 16, "balanced", "fc1"),
]
WGRAD = replace(
    GEMM,
    outputs=("gradient",),
    shapes={
        "cpu": [spread(256, 32, "zipf", H=512, I=256, product="fc1", dtype="fp32")],
        "cuda": WGRADS,
    },
    edges={
        kind: [one for one in shapes if one["product"] in ("fc1", "fc2")]
        for kind, shapes in GROUPED_EDGES.items()
    },
    inputs=wgrad_inputs,
    ours=our_wgrad,
    reference=plain_wgrad,
    work=_wgrad_work,
    published={label(shape): f"{PUBLISHED_WGRAD} TFLOP/s" for shape in WGRADS[:2]},
    baselines={
        "torch": plainly(wide_wgrad),
        "torch grouped_mm": fp8_rivals.grouped_mm_wgrad,
        "deepgemm": fp8_rivals.deep_gemm_wgrad,
        "deepgemm + layout": fp8_rivals.deep_gemm_wgrad_with_layout,
    },
)
WGRAD_TRITON, WGRAD_HOPPER = (
    one_implementation(WGRAD, wgrad_of(name), our_wgrad, WGRADS[:4])
    for name in ("triton", "hopper")
)
