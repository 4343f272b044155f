"""Cases of blockwise FP8 that move memory: fp8_quantize, fp8_quantize_weights, fp8_swiglu and its
backward; and the shapes of all FP8 cases.

The rows are those of one rank of DeepSeek-V3: K = 8 of 256 experts a token, EP ranks that each
bring T tokens and hold E = 256 / EP experts.  Routings: "balanced", every expert as many rows;
"zipf", the i-th most popular of the 256 chosen in proportion to 1 / i; "one-hot", all tokens to
this rank's first expert and their other choices evenly.

Shape legend: T tokens a rank, R rows of this rank's E experts, H hidden, I width of an expert,
P rows with each expert's padded to a multiple of 128.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from r1kern.benchmarks.cases_common import (
    DTYPES,
    Case,
    Inputs,
    Shape,
    Tensors,
    compiled,
    plainly,
)
from r1kern.benchmarks.harness import Work
from r1kern.kernels import fp8_quantize, fp8_swiglu
from r1kern.kernels import fp8_reference as reference
from r1kern.kernels.fp8_reference import CODE

EXPERTS, TOPK = 256, 8
H, I = 7168, 2048  # noqa: E741
ROUTINGS = ("balanced", "zipf", "one-hot")


def spread(T: int, EP: int, routing: str, **sizes: int | str) -> Shape:
    """The shape of a case whose rows are one rank's."""
    return dict(T=T, EP=EP, routing=routing) | sizes


def edge_spreads(kind: str, **sizes: int | str) -> list[Shape]:
    """No row, experts without and with one row, uneven and one-hot groups, around blocks of 128."""
    spreads = [(0, 64, "balanced"), (1, 8, "zipf"), (37, 8, "one-hot"), (100, 32, "zipf")]
    if kind == "cuda":
        spreads += [(512, 8, "balanced"), (516, 64, "balanced"), (4096, 8, "zipf")]
    return [spread(*one, **sizes) for one in spreads]


@cache
def rows_per_expert(T: int, EP: int, routing: str) -> list[int]:
    """Rows of each of the first rank's experts, of a routing over all 256; the same every time."""
    tokens, local = T * EP, EXPERTS // EP
    if routing == "zipf":
        return _zipf(tokens)[:local]
    hot = routing == "one-hot"
    others = EXPERTS - hot
    each, more = divmod(tokens * (TOPK - hot), others)
    even = [each + (i < more) for i in range(others)]
    return ([tokens] * hot + even)[:local]


def _zipf(tokens: int) -> list[int]:
    """Rows of all experts: each token's 8 are drawn without replacement, by the Gumbel trick."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(EXPERTS, generator=generator)
    counts, score = torch.zeros(EXPERTS, dtype=torch.int64), -(order + 1.0).log()
    for start in range(0, tokens, 1 << 16):
        noise = torch.empty(min(tokens - start, 1 << 16), EXPERTS)
        noise.exponential_(generator=generator).log_()
        chosen = (score - noise).topk(TOPK, dim=1).indices
        counts += chosen.flatten().bincount(minlength=EXPERTS)
    return counts.tolist()


def groups(shape: Shape) -> list[int]:
    """Rows of each expert of this rank."""
    return rows_per_expert(int(shape["T"]), int(shape["EP"]), str(shape["routing"]))


def offsets_of(shape: Shape, device: torch.device) -> Tensor:
    """int64 [E + 1]."""
    counts = torch.tensor([0, *groups(shape)], device=device)
    return counts.cumsum(0)


def fewer_tokens(shape: Shape) -> Shape:
    return shape | dict(T=min(int(shape["T"]), 128))


# -------------------------------------------------------------------------------------- quantise


def quantize_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """x [R, H], of many magnitudes, and offsets [E + 1]."""
    torch.manual_seed(seed)
    offsets, dtype = offsets_of(shape, device), DTYPES[shape["dtype"]]
    x = torch.randn(sum(groups(shape)), int(shape["H"]), device=device)
    x *= torch.randn(len(x), 1, device=device).exp()
    return Inputs((x.to(dtype), offsets))


def _layouts(shape: Shape) -> tuple[bool, bool]:
    """Whether by rows, whether by columns."""
    return shape["layout"] != "columns", shape["layout"] != "rows"


def our_quantize(shape: Shape, tensors: Tensors) -> Tensors:
    return fp8_quantize.quantize(*tensors, False, *_layouts(shape))


def plain_quantize(shape: Shape, tensors: Tensors) -> Tensors:
    x, offsets = tensors
    by_row, by_column = _layouts(shape)
    nothing = x.new_empty(0, dtype=CODE), x.new_empty(0, dtype=torch.float32)
    return (
        *(reference.quantize_rows(x) if by_row else nothing),
        *(reference.quantize_columns(x, offsets) if by_column else nothing),
    )


def bits(shape: Shape, tensors: Tensors, results: Tensors) -> Tensors:
    """Codes and scales as integers, but for the columns past the last expert: no one reads them."""
    codes, scales, codes_t, scales_t = results
    if codes_t.numel():
        end = int(reference.padded_offsets(tensors[-1])[-1])
        codes_t, scales_t = codes_t[:, :end], scales_t[: end // reference.BLOCK]
    return tuple(map(_integers, (codes, scales, codes_t, scales_t)))


def _integers(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int8 if x.dtype == CODE else torch.int32)


def _quantized_bytes(rows: int, width: int, layouts: int) -> float:
    """Codes and scales of [rows, width]; padding is not counted."""
    return rows * width * layouts * (1 + 4 / reference.BLOCK)


def _quantize_work(shape: Shape) -> Work:
    rows, width = sum(groups(shape)), int(shape["H"])
    read = rows * width * DTYPES[shape["dtype"]].itemsize
    return Work(0, read + _quantized_bytes(rows, width, sum(_layouts(shape))))


QUANTIZE = Case(
    outputs=("codes", "scales", "codes by columns", "scales by columns"),
    shapes={
        "cpu": [spread(256, 32, "zipf", H=512, layout="both", dtype="fp32")],
        "cuda": [
            spread(8192, EP, routing, H=H, layout=layout, dtype="bf16")
            for EP, routing, layout in (
                (64, "balanced", "rows"),
                (64, "balanced", "columns"),
                (64, "balanced", "both"),
                (8, "zipf", "both"),
            )
        ],
    },
    edges={
        kind: [
            one | dict(H=width, layout=layout, dtype=dtype)
            for one in edge_spreads(kind)
            for width, layout, dtype in sizes
        ]
        for kind, sizes in (
            ("cpu", ((72, "both", "fp32"), (128, "columns", "bf16"))),
            ("cuda", ((256, "both", "fp32"), (1160, "both", "bf16"), (7168, "rows", "bf16"))),
        )
    },
    shrink=fewer_tokens,
    inputs=quantize_inputs,
    ours=our_quantize,
    reference=plain_quantize,
    compared=bits,
    work=_quantize_work,
    baselines={"torch": plainly(plain_quantize), "torch.compile": compiled(plain_quantize)},
)


# --------------------------------------------------------------------------------------- weights


def weight_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """fc1 [E, 2I, H], gate and up."""
    torch.manual_seed(seed)
    size = EXPERTS // int(shape["EP"]), 2 * int(shape["I"]), int(shape["H"])
    return Inputs(((torch.randn(size, device=device) / 50).to(DTYPES[shape["dtype"]]),))


def our_quantize_weights(shape: Shape, tensors: Tensors) -> Tensors:
    return fp8_quantize.quantize_weights(list(tensors[0].unbind()), 2, False, True)


def plain_quantize_weights(shape: Shape, tensors: Tensors) -> Tensors:
    made = [reference.quantize_weight(weight, 2) for weight in tensors[0]]
    codes = torch.stack([code for code, _ in made])
    return codes, codes.transpose(1, 2).contiguous(), torch.stack([scale for _, scale in made])


def _weights(EP: int, H: int, I: int, dtype: str) -> Shape:  # noqa: E741
    return dict(EP=EP, H=H, I=I, dtype=dtype)


QUANTIZE_WEIGHTS = Case(
    outputs=("codes", "codes transposed", "scales"),
    shapes={
        "cpu": [_weights(32, 512, 256, "fp32")],
        "cuda": [_weights(32, H, I, dtype) for dtype in ("bf16", "fp32")],
    },
    edges={
        "cpu": [_weights(64, 72, 40, "bf16")],
        "cuda": [_weights(64, 200, 136, "bf16"), _weights(8, 256, 128, "fp32")],
    },
    shrink=lambda shape: shape | dict(EP=64),
    inputs=weight_inputs,
    ours=our_quantize_weights,
    reference=plain_quantize_weights,
    compared=lambda shape, tensors, results: tuple(map(_integers, results)),
    work=lambda shape: Work(
        0,
        2
        * EXPERTS
        // shape["EP"]
        * shape["H"]
        * shape["I"]
        * (DTYPES[shape["dtype"]].itemsize + 2),
    ),
    baselines={
        "torch": plainly(plain_quantize_weights),
        "torch.compile": compiled(plain_quantize_weights),
    },
)


# ---------------------------------------------------------------------------------------- SwiGLU


def swiglu_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """h [R, 2I], probs [R] and offsets [E + 1]."""
    torch.manual_seed(seed)
    R, dtype = sum(groups(shape)), DTYPES[shape["dtype"]]
    h = torch.randn(R, 2 * int(shape["I"]), device=device).to(dtype)
    return Inputs((h, torch.rand(R, device=device), offsets_of(shape, device)))


def our_swiglu(shape: Shape, tensors: Tensors) -> Tensors:
    return fp8_swiglu.swiglu_quantize(*tensors, False, True)


def plain_swiglu(shape: Shape, tensors: Tensors) -> Tensors:
    *tensors, offsets = tensors
    return _quantized(reference.swiglu(*tensors), offsets)


def _quantized(x: Tensor, offsets: Tensor) -> Tensors:
    return *reference.quantize_rows(x), *reference.quantize_columns(x, offsets)


def values(shape: Shape, tensors: Tensors, results: Tensors) -> Tensors:
    """What the codes stand for, [R, width] and transposed without padding, and the rest."""
    codes, scales, codes_t, scales_t, *rest = results
    columns = reference.dequantize_columns(codes_t, scales_t)
    first = reference.padded_offsets(tensors[-1])
    kept = [columns[:, i : i + n] for i, n in zip(first.tolist(), groups(shape), strict=False)]
    return reference.dequantize_rows(codes, scales), torch.cat(kept, 1), *rest


def exact_swiglu(shape: Shape, tensors: Tensors) -> Tensors:
    h, probs, _ = tensors
    gate, up = h.chunk(2, dim=-1)
    a = torch.nn.functional.silu(gate) * up * probs[:, None]
    return a, a.t()


def _swiglu_work(shape: Shape) -> Work:
    rows, width, itemsize = sum(groups(shape)), int(shape["I"]), DTYPES[shape["dtype"]].itemsize
    return Work(0, rows * (2 * width * itemsize + 4) + _quantized_bytes(rows, width, 2))


SWIGLU = Case(
    outputs=("rows", "columns"),
    shapes={
        "cpu": [spread(256, 32, "zipf", I=256, dtype="fp32")],
        "cuda": [
            spread(8192, EP, routing, I=I, dtype="bf16")
            for EP, routing in ((64, "balanced"), (8, "balanced"), (8, "zipf"), (8, "one-hot"))
        ],
    },
    edges={
        kind: [
            one | dict(I=width, dtype=dtype) for one in edge_spreads(kind) for width, dtype in sizes
        ]
        for kind, sizes in (
            ("cpu", ((40, "fp32"), (128, "bf16"))),
            ("cuda", ((128, "fp32"), (200, "bf16"), (2048, "bf16"))),
        )
    },
    shrink=fewer_tokens,
    inputs=swiglu_inputs,
    ours=our_swiglu,
    reference=plain_swiglu,
    compared=values,
    exact=exact_swiglu,
    margin=1.02,  # the same rounding, but for what a last place of the sigmoid tips over
    slack=1e-4,
    work=_swiglu_work,
    baselines={"torch": plainly(plain_swiglu), "torch.compile": compiled(plain_swiglu)},
)


def swiglu_backward_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """The gradient [R, I], and what `swiglu_inputs` makes."""
    (h, *rest), _ = swiglu_inputs(shape, device, seed)
    return Inputs((torch.randn_like(h[:, : h.shape[1] // 2]), h, *rest))


def our_swiglu_backward(shape: Shape, tensors: Tensors) -> Tensors:
    return fp8_swiglu.swiglu_backward_quantize(*tensors, False)


def plain_swiglu_backward(shape: Shape, tensors: Tensors) -> Tensors:
    *tensors, offsets = tensors
    grad_h, grad_probs = reference.swiglu_backward(*tensors)
    return *_quantized(grad_h, offsets), grad_probs


def exact_swiglu_backward(shape: Shape, tensors: Tensors) -> Tensors:
    grad, h, probs, offsets = tensors
    leaves = tuple(x.detach().requires_grad_() for x in (h, probs))
    with torch.enable_grad():
        (a, _) = exact_swiglu(shape, (*leaves, offsets))
    grad_h, grad_probs = torch.autograd.grad(a, leaves, grad)
    return grad_h, grad_h.t(), grad_probs


def _swiglu_backward_work(shape: Shape) -> Work:
    rows, width, itemsize = sum(groups(shape)), int(shape["I"]), DTYPES[shape["dtype"]].itemsize
    return Work(0, rows * (3 * width * itemsize + 8) + _quantized_bytes(rows, 2 * width, 2))


SWIGLU_BACKWARD = replace(
    SWIGLU,
    outputs=("grad_h by rows", "grad_h by columns", "grad_probs"),
    inputs=swiglu_backward_inputs,
    ours=our_swiglu_backward,
    reference=plain_swiglu_backward,
    exact=exact_swiglu_backward,
    work=_swiglu_backward_work,
    baselines={
        "torch": plainly(plain_swiglu_backward),
        "torch.compile": compiled(plain_swiglu_backward),
    },
)
