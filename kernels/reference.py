"""Every fused op in plain torch: the ground truth of tests and benchmarks.

Written to be read beside the papers, not to be fast: one group, one sequence at a time, all logits
at once.  Generic in dtype (float64 is the truth), differentiable by ordinary autograd.

Shape legend: N completions, B sequences, S longest completion, T tokens, H hidden, V vocabulary,
E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(
    rewards: Tensor, group_ids: Tensor, *, std: str = "population", eps: float = 1e-6
) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) in each group (DeepSeek-R1, equation 3).

    `std` is "population", "sample" or "none" (Dr. GRPO, arXiv 2503.20783: r_i - mean(r)).  A group
    whose rewards are all equal gets 0.  [N], [N] -> [N].
    """
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        member = group_ids == group
        r = rewards[member]
        if (r == r[0]).all():
            continue
        scale = 1 if std == "none" else r.std(correction=int(std == "sample")) + eps
        advantages[member] = (r - r.mean()) / scale
    return advantages


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.001,
    normalizer: str = "sequence",
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    ratio: str = "token",
    importance_weights: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-J of DeepSeek-R1's equation (1), with the KL estimator of its equation (2).

    Same arguments and results as `r1kern.ops.grpo_loss`, which documents them.
    """
    mask = mask.bool()
    num_sequences = num_sequences or max(len(logp), 1)
    num_tokens = num_tokens or max(int(mask.sum()), 1)
    names = ["ratio", "clip_fraction", "clip_low_fraction", "clip_high_fraction"]
    metrics = {name: logp.new_zeros(()) for name in names + ["kl"] * (ref_logp is not None)}
    objective = logp[mask].sum() * 0  # a zero with a gradient, should no sequence have a token
    for i, A in enumerate(advantages):
        o = mask[i]
        length = int(o.sum())
        if length == 0:
            continue
        log_rho = logp[i][o] - old_logp[i][o].detach()
        if ratio == "sequence":
            log_rho = log_rho.mean().expand(length)
        elif ratio == "completion":
            log_rho = log_rho.sum().expand(length)
        rho = log_rho.exp()
        J = torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
        if importance_weights is not None:
            J = J * importance_weights[i][o]
        if ref_logp is not None:
            log_ref = ref_logp[i][o].detach() - logp[i][o]
            kl = log_ref.exp() - log_ref - 1
            J = J - beta * kl
            metrics["kl"] += kl.detach().sum() / num_tokens
        if normalizer == "sequence":
            objective = objective + J.sum() / length / num_sequences
        elif normalizer == "token":
            objective = objective + J.sum() / num_tokens
        else:
            objective = objective + J.sum() / max_tokens / num_sequences
        low = ((A < 0) & (rho < 1 - clip_low)).to(rho.dtype)
        high = ((A > 0) & (rho > 1 + clip_high)).to(rho.dtype)
        metrics["ratio"] += rho.detach().sum() / num_tokens
        metrics["clip_fraction"] += (low + high).sum() / num_tokens
        metrics["clip_low_fraction"] += low.sum() / num_tokens
        metrics["clip_high_fraction"] += high.sum() / num_tokens
    return -objective, metrics


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature).

    [T, H], [V, H], int64 [T] -> [T], [T].  Matrix product in the inputs' dtype, the rest in float32
    at least.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logps = torch.log_softmax((hidden @ weight.T).to(dtype) / temperature, dim=1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(1)


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv 2412.19437, equations 12-16): one token at a time.

    [T, E], [E] -> indices [T, K], weights [T, K], counts [E].  The bias selects and never weighs
    (equation 16).  Of equal candidates the lowest index wins.
    """
    T, E = logits.shape
    size = E // num_groups
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()  # equation 15
    indices = torch.empty(T, topk, dtype=torch.int64)
    for t in range(T):
        choice = (scores[t] + bias).tolist()
        groups = [choice[g * size : (g + 1) * size] for g in range(num_groups)]
        best = sorted(range(num_groups), key=lambda g: -sum(sorted(groups[g])[-2:]))[:topk_groups]
        experts = [e for g in sorted(best) for e in range(g * size, (g + 1) * size)]
        indices[t] = torch.tensor(sorted(experts, key=lambda e: -choice[e])[:topk])
    weights = scores.gather(1, indices)
    if normalize:  # equation 13
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return indices, weights * scale, torch.bincount(indices.flatten(), minlength=E)
