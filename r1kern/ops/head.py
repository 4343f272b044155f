"""The language-model head, fused with what comes after it.

Shape legend: T tokens, H hidden, V rows of this rank's vocabulary shard, B sequences.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from r1kern.errors import UserError
from r1kern.kernels.linear_grpo_loss import METRICS, LinearGRPOLoss
from r1kern.kernels.linear_logprob import linear_logprob as _linear_logprob
from r1kern.ops import _check as check
from r1kern.ops.loss import at_least_one, group_advantage, grpo_loss, token_share


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of softmax(hidden @ weight.T / temperature).

    The logits are made in chunks of rows (`kernels.head.LOGITS_BYTES`) and made again in the
    backward.  Matrix products run in the inputs' dtype, statistics and accumulation in float32
    (float64 for float64).  Deterministic.

    Over `tp_group` each rank holds the consecutive rows of the vocabulary that follow those of the
    ranks before it; shards may differ in size.  `hidden` and `targets` are the same on every rank,
    and so are the results, bit for bit.  Two collectives in the forward, none in the backward.

    Gradients flow to `hidden` and `weight` from both results.  Over `tp_group`, `weight` receives
    its shard's whole gradient, and `hidden` only this rank's part: the caller sums it over the
    group (as Megatron's `copy_to_tensor_model_parallel_region` does in its backward).

    Args:
        hidden: floating [T, H].
        weight: [V, H], same dtype.
        targets: int64 [T], in the whole vocabulary.
        temperature: positive divisor of the logits.
        tp_group: the ranks that share the vocabulary.

    Returns:
        Log-probs [T] and entropies [T] (nats), float32, or float64 for float64 inputs.

    Raises:
        UserError: bad shape, dtype or device, a target outside the vocabulary, `temperature` not
            above 0, ranks that disagree about T.
    """
    check.head(hidden, weight, targets, temperature)
    group = _group_name(tp_group)
    logp, entropy, *_ = _linear_logprob(hidden, weight, targets, float(temperature), group)
    return logp, entropy


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    group_ids: Tensor | None = None,
    advantage_std: str = "population",
    sampled_logp: Tensor | None = None,
    importance_cap: float | None = None,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.001,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    normalizer: str = "sequence",
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    max_tokens: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """LM head and GRPO loss in one: `grpo_loss` of `linear_logprob`, per-token ratio.

    The gradients of `hidden` and `weight` are made in the forward, 6 T V H FLOPs in all, and the
    backward scales them; at most `kernels.head.LOGITS_BYTES` of logits exist at any time.  Rows
    without a gradient (masked, clipped; without advantage where `beta` and `entropy_coef` are 0)
    take no part in the products that make the gradients.  Vocabulary shards, gradients over
    `tp_group` and numerics as in `linear_logprob`, the objective and its sources as in `grpo_loss`.

    Args:
        hidden: floating [T, H], rows that predict completion tokens.
        weight: [V, H], same dtype.
        targets: int64 [T], in the whole vocabulary.
        old_logp: [T] log-probs under the policy before this update; None: the policy is still that
            one (the ratio is 1, its gradient is not 0).
        ref_logp: [T] under the reference; may be None when `beta` is 0.
        advantages: [B]; with `group_ids` the rewards, of which the advantages are then made.
        sequence_ids: int64 [T], the sequence (0..B-1) each row belongs to, in any order; None: the
            rows are a flattened [B, T / B] grid.
        mask: [T], 0 on rows that are no completion token; what lies there is not read.
        group_ids: int64 [B], see `group_advantage`, with `advantage_std`.
        sampled_logp: [T] log-probs of the generator, for the metrics "mismatch" and "max_mismatch"
            (of |old - sampled|) and for `importance_cap`.
        importance_cap: weigh the policy term with min(pi_old / pi_generator, this), truncated
            importance sampling; None: no weights.
        temperature: positive divisor of the logits.
        clip_low, clip_high, beta, kl, normalizer, num_sequences, num_tokens, max_tokens: as in
            `grpo_loss`.
        entropy_coef: adds this times the entropy, normalised like the rest, to the objective.
        tp_group: the ranks that share the vocabulary.

    Returns:
        The loss (0-d, float32 at least; its backward runs once) and detached 0-d metrics: those of
        `grpo_loss`, "entropy", and with `sampled_logp` "mismatch" and "max_mismatch" (a maximum;
        the others add up).

    Raises:
        UserError: as `linear_logprob` and `grpo_loss`; `importance_cap` without `sampled_logp`.
    """
    check.head(hidden, weight, targets, temperature)
    check.objective(
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        kl=kl,
        normalizer=normalizer,
        max_tokens=max_tokens,
        ref_logp=ref_logp,
    )
    if importance_cap is not None and sampled_logp is None:
        raise UserError("importance_cap needs sampled_logp, the generator's log-probs")
    if group_ids is not None:
        advantages = group_advantage(advantages.detach(), group_ids, std=advantage_std)
    sequence_ids = _sequence_ids(sequence_ids, targets, advantages)
    per_token = (old_logp, ref_logp, sampled_logp, mask)
    _check_rows(targets, dict(zip(ROWS, per_token, strict=True)), sequence_ids)
    if mask is not None:
        rows = mask.nonzero()[:, 0]
        hidden, targets, sequence_ids = (x[rows] for x in (hidden, targets, sequence_ids))
        per_token = tuple(None if x is None else x[rows] for x in per_token)

    real = torch.promote_types(hidden.dtype, torch.float32)
    constants = [None if x is None else x.detach().to(real) for x in per_token[:3]]
    num_tokens = at_least_one(len(targets) if num_tokens is None else num_tokens)
    share = token_share(
        _lengths(sequence_ids, len(advantages)),
        normalizer,
        num_sequences=len(advantages) if num_sequences is None else num_sequences,
        num_tokens=num_tokens,
        max_tokens=max_tokens,
    )
    loss, sums, largest = LinearGRPOLoss.apply(
        *(hidden, weight, targets, *constants),
        *(x[sequence_ids].to(real) for x in (advantages.detach(), share)),
        *(float(temperature), float(clip_low), float(clip_high), float(beta), kl),
        *(float(entropy_coef), importance_cap, _group_name(tp_group)),
        torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
    )
    metrics = dict(zip(METRICS, (sums / num_tokens).unbind(), strict=True))
    if ref_logp is None:
        del metrics["kl"]
    if sampled_logp is None:
        del metrics["mismatch"]
    else:
        metrics["max_mismatch"] = largest
    return loss, metrics


def linear_gspo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor | None = None,
    *,
    ratio: str = "sequence",
    sampled_logp: Tensor | None = None,
    importance_cap: float | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    **objective,
) -> tuple[Tensor, dict[str, Tensor]]:
    """LM head and GRPO loss with the ratio of whole sequences (GSPO, arXiv 2507.18071).

    A row's coefficient depends on its whole sequence: first all log-probs, then the gradients from
    logits made again, 8 T V H FLOPs in all.  Arguments and results as in `linear_grpo_loss`
    (without `mask`, `group_ids` and `entropy_coef`), and:

    Args:
        ratio: "sequence" or "completion", as in `grpo_loss`.
        objective: clip_low, clip_high, beta, kl, normalizer, num_sequences, num_tokens and
            max_tokens of `grpo_loss`.
    """
    logp, entropy = linear_logprob(
        hidden, weight, targets, temperature=temperature, tp_group=tp_group
    )
    if importance_cap is not None and sampled_logp is None:
        raise UserError("importance_cap needs sampled_logp, the generator's log-probs")
    sequence_ids = _sequence_ids(sequence_ids, targets, advantages)
    _check_rows(
        targets, dict(zip(ROWS, (old_logp, ref_logp, sampled_logp), strict=False)), sequence_ids
    )
    old = logp.detach() if old_logp is None else old_logp
    gap = torch.zeros_like(old) if sampled_logp is None else old - sampled_logp
    weights = None if importance_cap is None else gap.exp().clamp(max=importance_cap)
    place, shape = _grid(sequence_ids, len(advantages))

    def grid(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.new_zeros(shape).flatten().index_copy(0, place, x).view(shape)

    loss, metrics = grpo_loss(
        *(grid(x) for x in (logp, old, ref_logp)),
        advantages,
        grid(torch.ones_like(logp)),
        ratio=ratio,
        importance_weights=grid(weights),
        **objective,
    )
    num_tokens = objective.get("num_tokens")
    num_tokens = at_least_one(len(targets) if num_tokens is None else num_tokens)
    metrics["entropy"] = entropy.detach().sum() / num_tokens
    if sampled_logp is not None:
        metrics["mismatch"] = gap.abs().sum() / num_tokens
        metrics["max_mismatch"] = gap.abs().max() if len(gap) else gap.sum()
    return loss, metrics


ROWS = ("old_logp", "ref_logp", "sampled_logp", "mask")


def _check_rows(targets: Tensor, per_token: dict[str, Tensor | None], sequence_ids: Tensor) -> None:
    for name, x in per_token.items():
        if x is not None and x.shape != targets.shape:
            raise UserError(f"{name} must be {list(targets.shape)}, got {check.describe(x)}")
    check.one_device(targets=targets, sequence_ids=sequence_ids, **per_token)


def _sequence_ids(sequence_ids: Tensor | None, targets: Tensor, advantages: Tensor) -> Tensor:
    if advantages.dim() != 1 or not advantages.is_floating_point():
        raise UserError(f"advantages must be a float tensor [B], got {check.describe(advantages)}")
    T, B = len(targets), len(advantages)
    if sequence_ids is None:
        if T % max(B, 1):
            raise UserError(f"{T} rows are no grid of {B} sequences: give sequence_ids")
        return torch.arange(B, device=targets.device).repeat_interleave(T // max(B, 1))
    if sequence_ids.shape != targets.shape or sequence_ids.is_floating_point():
        raise UserError(f"sequence_ids must be integers [{T}], got {check.describe(sequence_ids)}")
    return sequence_ids.long()


def _lengths(sequence_ids: Tensor, B: int) -> Tensor:
    return sequence_ids.new_zeros(B).index_add(0, sequence_ids, torch.ones_like(sequence_ids))


def _grid(sequence_ids: Tensor, B: int) -> tuple[Tensor, tuple[int, int]]:
    """Place of each row in a flattened [B, S] grid of the sequences, and its shape."""
    lengths = _lengths(sequence_ids, B)
    S = int(lengths.max()) if len(sequence_ids) else 0
    order = sequence_ids.argsort(stable=True)
    position = torch.empty_like(order)
    starts = lengths.cumsum(0) - lengths
    position[order] = torch.arange(len(order), device=order.device) - starts[sequence_ids[order]]
    return sequence_ids * S + position, (B, S)


def _group_name(tp_group: dist.ProcessGroup | None) -> str | None:
    return tp_group.group_name if tp_group is not None and tp_group.size() > 1 else None
