"""Cases of the LM head and of the loss: head, logprob, logprob+backward, advantage, grpo_loss.

Shape legend: N completions, G completions of a group, B sequences, S tokens of a sequence,
T tokens, H hidden, V rows of the vocabulary; live: per cent of the tokens that have a gradient.
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
from r1kern.kernels import reference

SHARDS = (129280, 64640, 32320, 16160)  # DeepSeek-V3's vocabulary over 1, 2, 4, 8 ranks


def _head(T: int, H: int, V: int, dtype: str, S: int = 512, beta: float = 0.04, live: int = 100):
    return dict(T=T, H=H, V=V, S=S, beta=beta, live=live, dtype=dtype)


def _small(shape: Shape) -> Shape:
    """As wide as the row measured, in fewer tokens; on the CPU's shapes narrower too."""
    if shape["dtype"] == "fp32":
        return shape | dict(T=256, H=64, V=3001, S=64)
    return shape | dict(T=1024, S=256)


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Roughly the policy's own log-probs, in small chunks."""
    chunks = zip(hidden.split(256), targets.split(256), strict=True)
    logps = [-_nll(h, weight, t) for h, t in chunks]
    return torch.cat(logps) if logps else hidden.new_empty(0, dtype=torch.float32)


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def head_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """hidden, weight, targets, old_logp, ref_logp, advantages, sequence_ids, mask.

    The ratios pi / pi_old are near 0.6, 0.9, 1, 1.1 or 1.6: some clipped, none so near the clip's
    edge that rounding decides it.
    """
    T, H, V, S = (int(shape[name]) for name in "THVS")
    torch.manual_seed(seed)
    B, dtype = max(-(-T // S), 1), DTYPES[shape["dtype"]]
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device) * 2 / H**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (T,), device=device)
    with torch.no_grad():
        logp = _log_probs(hidden, weight, targets)
    steps = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5], device=device)
    old, ref = (logp + steps[torch.randint(5, (T,), device=device)] for _ in range(2))
    advantages = torch.randn(B, device=device) + 0.5
    mask = torch.ones(T, device=device, dtype=torch.bool)
    if shape["live"] < 100:  # half of the loss is masked away, half lies in zero-variance groups
        kept = (float(shape["live"]) / 100) ** 0.5
        mask = torch.rand(T, device=device) < kept
        advantages = advantages * (torch.rand(B, device=device) < kept)
    sequence_ids = torch.arange(T, device=device) // S
    return Inputs((hidden, weight, targets, old, ref, advantages, sequence_ids, mask))


def plain_loss(
    logp: Tensor,
    old: Tensor,
    ref: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    mask: Tensor,
    beta: float,
) -> Tensor:
    """DeepSeek-R1's equation (1) over flat tokens, as anyone would write it."""
    A = advantages[sequence_ids]
    rho = (logp - old).exp()
    term = torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)
    log_ref = ref - logp
    term = term - beta * (log_ref.exp() - log_ref - 1)
    live = mask.to(logp.dtype)
    lengths = torch.zeros_like(advantages).index_add(0, sequence_ids, live.to(advantages.dtype))
    share = live / (lengths.clamp(min=1)[sequence_ids] * len(advantages))
    return -(term * share).sum()


def plain_head(shape: Shape, tensors: Tensors) -> Tensors:
    """The same results in plain torch: the loss, and the entropy that is logged."""
    hidden, weight, targets, *rest = tensors
    logits = hidden @ weight.T
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(1)[rest[-1]].sum() / rest[-1].sum().clamp(min=1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    return plain_loss(logp, *rest, shape["beta"]), entropy


def nll_head(shape: Shape, tensors: Tensors) -> Tensors:
    """The loss alone: no entropy, and torch's own fused cross-entropy."""
    hidden, weight, targets, *rest = tensors
    return (plain_loss(-_nll(hidden, weight, targets), *rest, shape["beta"]),)


def our_head(shape: Shape, tensors: Tensors) -> Tensors:
    *tensors, mask = tensors
    mask = None if shape["live"] == 100 else mask
    loss, metrics = ops.linear_grpo_loss(*tensors, mask=mask, beta=shape["beta"])
    return loss, metrics["entropy"]


def liger_grpo(kind: str) -> Forward:
    """`LigerFusedLinearGRPOLoss`; its loss math compiled on CUDA, as it comes, eager on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        hidden, weight, targets, old, ref, advantages, _, mask = tensors
        B = len(advantages)
        loss = LigerFusedLinearGRPOLoss(
            beta=shape["beta"], loss_type="grpo", compiled=kind == "cuda"
        )
        batch = (x.view(B, -1) for x in (targets, mask))
        old, ref = (x.view(B, -1) for x in (old, ref))
        result, _ = loss(
            hidden.view(B, -1, shape["H"]),
            weight,
            *batch,
            advantages,
            ref_per_token_logps=ref,
            old_per_token_logps=old,
        )
        return (result,)

    return forward


def liger_scaled_ce(kind: str) -> Forward:
    """Liger's per-token head (on Hopper its CuTe DSL kernel) with the loss above in plain torch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as ScaledCE,
    )

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        hidden, weight, targets, *rest = tensors
        nll = ScaledCE.apply(hidden, weight, targets)
        return (plain_loss(-nll, *rest, shape["beta"]),)

    return forward


def _head_bytes(shape: Shape, trains: bool) -> float:
    """Hidden states and weight read once and, with a backward, their gradients written once."""
    matrices = (shape["T"] + shape["V"]) * shape["H"]
    return (1 + trains) * matrices * DTYPES[shape["dtype"]].itemsize


def _three_products(shape: Shape) -> Work:
    """Logits, gradient of hidden, gradient of weight; counted for all tokens, live or not."""
    return Work(6 * shape["T"] * shape["V"] * shape["H"], _head_bytes(shape, True))


def _one_product(shape: Shape) -> Work:
    return Work(2 * shape["T"] * shape["V"] * shape["H"], _head_bytes(shape, False))


HEAD = Case(
    outputs=("loss", "entropy", "grad_hidden", "grad_weight"),
    shapes={
        "cpu": [_head(T, 512, 32000, "fp32") for T in (4096, 2048)],
        "cuda": [_head(T, 7168, V, "bf16") for T in (8192, 16384, 32768) for V in SHARDS]
        + [_head(8192, 7168, 129280, "bf16", beta=0.0, live=50)],
    },
    edges={
        "cpu": [
            _head(T, 48, V, dtype, S, beta, live)
            for dtype in ("fp32", "bf16")
            for T, V, S, beta, live in (
                (0, 300, 16, 0.04, 100),
                (1, 257, 16, 0.04, 100),
                (300, 1031, 64, 0.04, 60),
                (300, 1031, 64, 0.0, 30),
                (66_000, 64, 512, 0.0, 30),
            )
        ],
        "cuda": [_head(T, 512, V, "bf16", 256, 0.04, 80) for T in (0, 1, 1000) for V in SHARDS]
        + [
            _head(T, 256, V, dtype, 100, beta, live)
            for dtype in DTYPES
            for T, V in ((1000, 1031), (777, 50_257), (70_000, 517))
            for beta, live in ((0.04, 100), (0.0, 40), (0.0, 2))
        ],
    },
    shrink=_small,
    inputs=head_inputs,
    ours=our_head,
    reference=plain_head,
    work=_three_products,
    baselines={
        "torch": plainly(plain_head),
        "torch, no entropy": plainly(nll_head),
        "torch.compile": compiled(plain_head),
        "liger grpo": liger_grpo,
        "liger scaled-ce": liger_scaled_ce,
    },
    trains=True,
)


# ------------------------------------------------------------------------------------- logprob


def logprob_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """hidden, weight, targets; the gradients of log-prob and entropy."""
    T, H, V = (int(shape[name]) for name in "THV")
    torch.manual_seed(seed)
    dtype = DTYPES[shape["dtype"]]
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device) * 2 / H**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (T,), device=device)
    return Inputs((hidden, weight, targets), tuple(torch.randn(2, T, device=device)))


def _reference_logprob(shape: Shape, tensors: Tensors) -> Tensors:
    return reference.linear_logprob(*tensors)


def liger_logprob(kind: str) -> Forward:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as ScaledCE,
    )

    def forward(shape: Shape, tensors: Tensors) -> Tensors:
        nll, entropy = ScaledCE.apply(*tensors, return_entropy=True)
        return -nll, entropy

    return forward


def _plain_shape(shape: Shape) -> Shape:
    return {name: shape[name] for name in ("T", "H", "V", "dtype")}


LOGPROB = Case(
    outputs=("logp", "entropy", "grad_hidden", "grad_weight"),
    shapes={
        "cpu": [dict(T=2048, H=512, V=32000, dtype="fp32")],
        "cuda": [dict(T=8192, H=7168, V=V, dtype="bf16") for V in SHARDS],
    },
    edges={
        kind: list({str(s): s for s in map(_plain_shape, shapes)}.values())
        for kind, shapes in HEAD.edges.items()
    },
    shrink=lambda shape: _plain_shape(_small(shape)),
    inputs=logprob_inputs,
    ours=lambda shape, tensors: ops.linear_logprob(*tensors),
    reference=_reference_logprob,
    work=_one_product,
    baselines={
        "torch": plainly(_reference_logprob),
        "torch.compile": compiled(_reference_logprob),
        "liger scaled-ce": liger_logprob,
    },
)

LOGPROB_BACKWARD = replace(LOGPROB, work=_three_products, trains=True)


# ---------------------------------------------------------------------- advantage and grpo_loss


def advantage_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Rewards and group ids, groups scattered; every third group has equal rewards."""
    torch.manual_seed(seed)
    N, G = int(shape["N"]), int(shape["G"])
    ids = (torch.arange(N, device=device) // G)[torch.randperm(N, device=device)]
    rewards = torch.where(ids % 3 == 0, 1.0, torch.randn(N, device=device))
    return Inputs((rewards.to(DTYPES[shape["dtype"]]), ids * 7919))


def plain_advantage(shape: Shape, tensors: Tensors) -> Tensors:
    rewards, ids = tensors
    _, group, size = ids.unique(return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(size))
    centred = rewards - (zeros.index_add(0, group, rewards) / size)[group]
    variance = (zeros.index_add(0, group, centred.square()) / size)[group]
    return (centred / (variance.sqrt() + 1e-6),)


ADVANTAGE = Case(
    outputs=("advantages",),
    shapes={
        "cpu": [dict(N=4096, G=16, dtype="fp32")],
        "cuda": [dict(N=N, G=16, dtype="fp32") for N in (512, 8192)],
    },
    edges={
        kind: [
            dict(N=N, G=G, dtype="fp32") for N, G in ((0, 4), (1, 1), (1000, 7), (300, 300), large)
        ]
        for kind, large in (("cpu", (2000, 16)), ("cuda", (70_000, 64)))
    },
    shrink=lambda shape: shape | dict(N=512),
    inputs=advantage_inputs,
    ours=lambda shape, tensors: (ops.group_advantage(*tensors),),
    reference=lambda shape, tensors: (reference.group_advantage(*tensors),),
    work=lambda shape: Work(0, shape["N"] * (4 + 8 + 4)),  # reward, id; advantage
    baselines={"torch": plainly(plain_advantage), "torch.compile": compiled(plain_advantage)},
)


def loss_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """logp, old_logp, ref_logp [B, S], advantages [B], mask [B, S] with ragged lengths."""
    torch.manual_seed(seed)
    B, S = int(shape["B"]), int(shape["S"])
    logp = -3 * torch.rand(B, S, device=device)
    steps = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5], device=device)
    old, ref = (logp + steps[torch.randint(5, (B, S), device=device)] for _ in range(2))
    lengths = torch.randint(S + 1, (B, 1), device=device)
    mask = torch.arange(S, device=device) < lengths
    advantages = torch.randn(B, device=device) + 0.5
    return Inputs((logp.requires_grad_(), old, ref, advantages, mask))


def plain_grpo_loss(shape: Shape, tensors: Tensors) -> Tensors:
    logp, old, ref, advantages, mask = tensors
    ids = torch.arange(len(logp), device=logp.device).repeat_interleave(logp.shape[1])
    flat = (x.flatten() for x in (logp, old, ref))
    return (plain_loss(*flat, advantages, ids, mask.flatten(), 0.04),)


LOSS = Case(
    outputs=("loss", "grad_logp"),
    shapes={
        "cpu": [dict(B=64, S=1024, dtype="fp32")],
        "cuda": [dict(B=B, S=2048, dtype="fp32") for B in (16, 512)],
    },
    edges={
        kind: [dict(B=B, S=S, dtype="fp32") for B, S in ((1, 1), (5, 9), (3, 66_000))]
        for kind in ("cpu", "cuda")
    },
    shrink=lambda shape: shape | dict(B=8, S=128),
    inputs=loss_inputs,
    ours=lambda shape, tensors: ops.grpo_loss(*tensors, beta=0.04)[:1],
    reference=lambda shape, tensors: reference.grpo_loss(*tensors, beta=0.04)[:1],
    # logp, old, ref, mask; gradient
    work=lambda shape: Work(0, shape["B"] * shape["S"] * (4 + 4 + 4 + 1 + 4)),
    baselines={"torch": plainly(plain_grpo_loss), "torch.compile": compiled(plain_grpo_loss)},
    trains=True,
)
