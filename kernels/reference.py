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
    kl: str = "k3",
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
            k = log_ref.square() / 2 if kl == "k2" else log_ref.exp() - log_ref - 1
            if kl == "k3_unbiased":
                k = k * (logp[i][o] - old_logp[i][o].detach()).exp()
            J = J - beta * k
            metrics["kl"] += k.detach().sum() / num_tokens
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


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    *,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    sampled_logp: Tensor | None = None,
    importance_cap: float | None = None,
    **options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All logits, then `grpo_loss` of one sequence after another.

    Same arguments and results as `r1kern.ops.linear_grpo_loss`, which documents them.
    """
    logp, entropy = linear_logprob(hidden, weight, targets, temperature=temperature)
    old = logp.detach() if old_logp is None else old_logp
    B, num_tokens = len(advantages), num_tokens or max(len(targets), 1)
    num_sequences = num_sequences or max(B, 1)
    weights = None
    if importance_cap is not None:
        weights = (old - sampled_logp).exp().clamp(max=importance_cap)
    loss, metrics = logp.sum() * 0, {}
    for b in range(B):
        row = [x if x is None else x[sequence_ids == b][None] for x in (logp, old, ref_logp)]
        part, counted = grpo_loss(
            *row,
            advantages[b : b + 1],
            torch.ones_like(row[0]),
            importance_weights=None if weights is None else weights[sequence_ids == b][None],
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            **options,
        )
        length = max(int((sequence_ids == b).sum()), 1)
        over = {
            "sequence": num_sequences * length,
            "token": num_tokens,
            "constant": num_sequences * (options.get("max_tokens") or 0),
        }[options.get("normalizer", "sequence")]
        loss = loss + part - entropy_coef * entropy[sequence_ids == b].sum() / over
        metrics = {name: metrics.get(name, 0) + value for name, value in counted.items()}
    metrics["entropy"] = entropy.detach().sum() / num_tokens
    if sampled_logp is not None:
        gap = (old - sampled_logp).detach().abs()
        metrics["mismatch"] = gap.sum() / num_tokens
        metrics["max_mismatch"] = gap.max() if len(gap) else gap.sum()
    return loss, metrics


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    scale: float = 1.0,
    normalize: bool = True,
    align: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv 2412.19437, equations 12-16): one token at a time.

    [T, E], [E] -> indices [T, K], weights [T, K], counts [E] and the layout sorted by expert, as
    `r1kern.ops.Routing` documents them.  The bias selects and never weighs (equation 16).  Of equal
    candidates the lowest index wins.
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
    counts = torch.bincount(indices.flatten(), minlength=E)
    shares = scores / scores.sum(1, keepdim=True)  # equation 20
    return indices, weights * scale, counts, *layout(indices, E, align), shares.sum(0)


def layout(indices: Tensor, E: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of each token [T, K] -> offsets [E + 1], slots [T, K], order [R] of `ops.Routing`."""
    T, K = indices.shape
    offsets, slots = torch.zeros(E + 1, dtype=torch.int64), torch.empty(T, K, dtype=torch.int32)
    order = torch.full(((T * K + E * (align - 1)) // align * align,), -1, dtype=torch.int32)
    for e in range(E):
        row = int(offsets[e])
        for t, k in (indices == e).nonzero().tolist():
            slots[t, k], order[row] = row, t * K + k
            row += 1
        offsets[e + 1] = -(-row // align) * align
    return offsets, slots, order


def permute(x: Tensor, order: Tensor, K: int) -> Tensor:
    """Row r is x[order[r] // K], or 0 where order[r] is -1.  [T, H], [R] -> [R, H]."""
    rows = x.new_zeros(len(order), x.shape[1])
    for r, choice in enumerate(order.tolist()):
        if choice >= 0:
            rows[r] = x[choice // K]
    return rows


def unpermute(rows: Tensor, slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_k weights[t, k] rows[slots[t, k]], in float32 at least.  [R, H], [T, K] -> [T, H]."""
    x = rows.to(torch.promote_types(rows.dtype, torch.float32))[slots.long()]
    return (x if weights is None else x * weights[..., None]).sum(1).to(rows.dtype)
