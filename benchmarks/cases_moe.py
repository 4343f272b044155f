"""Cases of the router and of permutation: route, permute, unpermute, route+permute.

DeepSeek-V3's router: 8 groups of experts, the best 4 stay, K = 8 experts a token.

Shape legend: T tokens, H hidden, E experts, K experts per token, R rows of the permuted layout.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from r1kern import ops
from r1kern.benchmarks.cases_common import (
    DTYPES,
    Case,
    Forward,
    Inputs,
    Shape,
    Tensors,
    compiled,
    plainly,
)
from r1kern.benchmarks.harness import Work

OPTIONS = dict(num_groups=8, topk_groups=4, topk=8, scale=2.5)
K = OPTIONS["topk"]


def _router(T: int, E: int = 256, align: int = 1, dtype: str = "fp32") -> Shape:
    return dict(T=T, E=E, align=align, dtype=dtype)


def _rows(T: int, H: int, dtype: str, E: int = 256, align: int = 1) -> Shape:
    return dict(T=T, H=H, E=E, align=align, dtype=dtype)


# --------------------------------------------------------------------------------------- router


def _selected(choice: Tensor) -> tuple[Tensor, Tensor]:
    """Experts of each token [T, K], best first, and by how much they win [T].

    The margin is the least of the gaps that decide the choice and its order.
    """
    T, E = choice.shape
    size = E // OPTIONS["num_groups"]
    strength = choice.view(T, OPTIONS["num_groups"], size).topk(2).values.sum(2)
    ranked = strength.sort(dim=1, descending=True)
    last = OPTIONS["topk_groups"]
    margin = ranked.values[:, last - 1] - ranked.values[:, last]
    allowed = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, ranked.indices[:, :last], 1)
    open_to = choice.masked_fill(~allowed.repeat_interleave(size, 1), -torch.inf)
    best = open_to.topk(K + 1, dim=1)
    gaps = best.values[:, :-1] - best.values[:, 1:]
    return best.indices[:, :K], torch.minimum(margin, gaps.amin(1))


def router_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """logits [T, E], bias [E]; gradients of weights and score_sums.

    Tokens whose choice hangs on a rounding are left out: there float64 is no judge of float32.
    """
    T, E = int(shape["T"]), int(shape["E"])
    torch.manual_seed(seed)
    dtype = DTYPES[shape["dtype"]]
    bias = 0.1 * torch.randn(E, device=device)
    logits = torch.randn(2 * T + 8, E, device=device).to(dtype)
    _, margin = _selected(logits.double().sigmoid() + bias)
    logits = logits[margin > 2e-6][:T].contiguous()
    assert len(logits) == T
    upstream = (torch.randn(T, K, device=device), torch.randn(E, device=device))
    return Inputs((logits.requires_grad_(), bias), upstream)


def plain_route(shape: Shape, tensors: Tensors) -> Tensors:
    """The op's results in its order, in plain torch."""
    logits, bias = tensors
    E, align = logits.shape[1], int(shape["align"])
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    indices, _ = _selected(scores.detach() + bias)
    weights = scores.gather(1, indices)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * OPTIONS["scale"]
    sums = (scores / scores.sum(1, keepdim=True)).sum(0)
    return weights, sums, indices, *layout(indices, E, align)


def layout(indices: Tensor, E: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """counts [E], offsets [E + 1], slots [T, K] and order [R] of the permuted layout."""
    flat = indices.flatten()
    counts = torch.zeros(E, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + align - 1) // align * align
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    by_expert = flat.argsort(stable=True)
    experts = flat[by_expert]
    place = torch.arange(len(flat), device=flat.device)
    place = place - (counts.cumsum(0) - counts)[experts] + offsets[experts]
    slots = torch.empty_like(flat).scatter_(0, by_expert, place)
    R = len(flat) if align == 1 else (len(flat) + E * (align - 1)) // align * align
    order = flat.new_full((R,), -1).scatter_(0, place, by_expert)
    return counts, offsets, slots.view(indices.shape).int(), order.int()


def our_route(shape: Shape, tensors: Tensors) -> Tensors:
    r = ops.route(*tensors, **OPTIONS, align=int(shape["align"]))
    return r.weights, r.score_sums, r.indices, r.counts, r.offsets, r.slots, r.order


def megatron_route(kind: str) -> Forward:
    """Megatron's router in plain torch: dense maps, no layout."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        logits, bias = tensors
        return topk_routing_with_score_function(
            logits,
            K,
            num_groups=OPTIONS["num_groups"],
            group_topk=OPTIONS["topk_groups"],
            scaling_factor=OPTIONS["scale"],
            score_function="sigmoid",
            expert_bias=bias,
        )

    return forward


ROUTE = Case(
    outputs=(
        *("weights", "score_sums", "indices", "counts", "offsets", "slots", "order"),
        "grad_logits",
    ),
    shapes={"cpu": [_router(8192)], "cuda": [_router(T) for T in (8192, 32768)]},
    edges={
        "cpu": [
            _router(T, E, align, dtype)
            for T, E, align, dtype in (
                (0, 64, 1, "fp32"),
                (1, 64, 16, "fp32"),
                (500, 64, 16, "bf16"),
                (70_000, 64, 1, "fp32"),
            )
        ],
        # Around the sizes at which one more block, or one more wave of blocks, starts.
        "cuda": [
            _router(T, align=align)
            for T in (0, 1, 7, 31, 33, 127, 129, 131, 132, 133, 1000, 4223, 4225, 8192, 70_000)
            for align in (1, 128)
        ]
        + [_router(3000, 64, 16, dtype) for dtype in DTYPES],
    },
    shrink=lambda shape: shape,
    inputs=router_inputs,
    ours=our_route,
    reference=plain_route,
    work=lambda shape: Work(0, shape["T"] * (4 * shape["E"] + 9 * K + shape["E"])),
    baselines={"torch": plainly(plain_route), "torch.compile": compiled(plain_route)},
)


# ---------------------------------------------------------------------------- permute, unpermute


def _routing(tensors: Tensors) -> ops.Routing:
    names = ("indices", "weights", "counts", "offsets", "slots", "order", "score_sums")
    return ops.Routing(**dict(zip(names, tensors, strict=True)))


def _random_routing(shape: Shape, device: torch.device) -> Tensors:
    """A routing as tensors in the order of `_routing`: experts at random, unevenly loaded."""
    T, E = int(shape["T"]), int(shape["E"])
    popular = torch.rand(E, device=device).square() + 0.02
    indices = torch.rand(T, E, device=device).mul_(popular).topk(K, dim=1).indices
    weights = torch.rand(T, K, device=device)
    spread = layout(indices, E, int(shape["align"]))
    return indices, weights, *spread, torch.zeros(E, device=device)


def permute_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """x [T, H] and the routing; the gradient of the rows."""
    torch.manual_seed(seed)
    T, H, dtype = int(shape["T"]), int(shape["H"]), DTYPES[shape["dtype"]]
    routing = _random_routing(shape, device)
    R = len(_routing(routing).order)
    x = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    return Inputs((x, *routing), (torch.randn(R, H, device=device).to(dtype),))


def plain_permute(shape: Shape, tensors: Tensors) -> Tensors:
    x, *routing = tensors
    order = _routing(routing).order.long()
    if shape["align"] == 1:  # no padding
        return (x.index_select(0, order // K),)
    rows, filled = x.new_zeros(len(order), x.shape[1]), order >= 0
    return (rows.index_put((filled,), x[order[filled] // K]),)


def unpermute_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """rows [R, H] and the routing, whose weights get a gradient; the gradient of the result."""
    inputs = permute_inputs(shape, device, seed)
    x, indices, weights, *rest = inputs.tensors
    (rows,) = inputs.upstream
    tensors = (rows.requires_grad_(), indices, weights.requires_grad_(), *rest)
    return Inputs(tensors, (x.detach(),))


def plain_unpermute(shape: Shape, tensors: Tensors) -> Tensors:
    rows, *routing = tensors
    routing = _routing(routing)
    picked = rows[routing.slots.long()].to(torch.promote_types(rows.dtype, torch.float32))
    return ((picked * routing.weights[:, :, None]).sum(1).to(rows.dtype),)


def our_unpermute(shape: Shape, tensors: Tensors) -> Tensors:
    rows, *routing = tensors
    routing = _routing(routing)
    return (ops.unpermute(rows, routing, routing.weights),)


def _row_bytes(shape: Shape) -> Work:
    """T rows on one side, K * T on the other; indices and padding are not counted."""
    return Work(0, shape["T"] * shape["H"] * (1 + K) * DTYPES[shape["dtype"]].itemsize)


PERMUTE = Case(
    outputs=("rows", "grad_x"),
    shapes={
        "cpu": [_rows(8192, 512, "fp32")],
        "cuda": [_rows(T, 7168, "bf16") for T in (8192, 32768)],
    },
    edges={
        kind: [
            _rows(T, H, dtype, 64, align)
            for dtype in DTYPES
            for T, H in sizes
            for align in (1, 128)
        ]
        for kind, sizes in (
            ("cpu", ((0, 8), (1, 8), (301, 72))),
            ("cuda", ((0, 64), (1, 64), (301, 1000), (1001, 7168), (70_000, 72))),
        )
    },
    shrink=lambda shape: shape | dict(T=1024),
    inputs=permute_inputs,
    ours=lambda shape, tensors: (ops.permute(tensors[0], _routing(tensors[1:])),),
    reference=plain_permute,
    work=_row_bytes,
    baselines={"torch": plainly(plain_permute), "torch.compile": compiled(plain_permute)},
)

UNPERMUTE = replace(
    PERMUTE,
    outputs=("tokens", "grad_rows", "grad_weights"),
    inputs=unpermute_inputs,
    ours=our_unpermute,
    reference=plain_unpermute,
    baselines={"torch": plainly(plain_unpermute), "torch.compile": compiled(plain_unpermute)},
)


# ------------------------------------------------------------------------------ route + permute


def both_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """x [T, H], logits [T, E], bias [E]; gradients of rows and weights."""
    routed = router_inputs(shape | dict(dtype="fp32"), device, seed)
    T, H, dtype = int(shape["T"]), int(shape["H"]), DTYPES[shape["dtype"]]
    x = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    grad_rows = torch.randn(T * K, H, device=device).to(dtype)
    return Inputs((x, *routed.tensors), (grad_rows, routed.upstream[0]))


def plain_both(shape: Shape, tensors: Tensors) -> Tensors:
    x, *routed = tensors
    weights, _, _, _, _, _, order = plain_route(shape, tuple(routed))
    return x.index_select(0, order.long() // K), weights


def our_both(shape: Shape, tensors: Tensors) -> Tensors:
    x, *routed = tensors
    routing = ops.route(*routed, **OPTIONS)
    return ops.permute(x, routing), routing.weights


def megatron_both(kind: str) -> Forward:
    """Megatron's router and permutation in plain torch, the row weights permuted along, as its
    token dispatchers call them."""
    route = megatron_route(kind)
    from megatron.core.transformer.moe.moe_utils import permute

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        x, *routed = tensors
        probs, routing_map = route(shape, tuple(routed))
        rows, _, _ = permute(x, routing_map, probs=probs, num_out_tokens=len(x) * K)
        return (rows,)

    return forward


def _both_work(shape: Shape) -> Work:
    return Work(0, ROUTE.work(shape).bytes + _row_bytes(shape).bytes)


ROUTE_PERMUTE = Case(
    outputs=("rows", "weights", "grad_x", "grad_logits"),
    shapes={
        "cpu": [_rows(8192, 512, "fp32")],
        "cuda": [_rows(T, 7168, "bf16") for T in (8192, 32768)],
    },
    edges={"cpu": [], "cuda": []},  # its parts have them
    shrink=lambda shape: shape | dict(T=1024),
    inputs=both_inputs,
    ours=our_both,
    reference=plain_both,
    work=_both_work,
    baselines={
        "torch": plainly(plain_both),
        "torch.compile": compiled(plain_both),
        "megatron": megatron_both,
    },
)
