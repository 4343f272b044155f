"""Group-relative advantages, and the GRPO loss from given log-probs.

Shape legend: N completions, B sequences, S longest completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern.errors import UserError
from r1kern.kernels.advantage import group_advantage as _group_advantage
from r1kern.kernels.objective import METRICS
from r1kern.kernels.objective import grpo_loss as _grpo_loss
from r1kern.ops import _check as check


def group_advantage(
    rewards: Tensor, group_ids: Tensor, *, std: str = "population", eps: float = 1e-6
) -> Tensor:
    """Group-relative advantage A_i = (r_i - mean(r)) / (std(r) + eps), DeepSeek-R1 equation (3).

    The paper's plain `std` is read as the population's.  A group whose rewards are all equal, a
    single completion included, gets exactly 0.  Computed in float64; no gradient.

    Args:
        rewards: floating [N].
        group_ids: integer [N]; completions with equal ids form a group, in any order and size.
        std: "population" (divide by n), "sample" (by n - 1), or "none": A_i = r_i - mean(r), as in
            Dr. GRPO (arXiv 2503.20783).
        eps: added to the standard deviation, in units of reward.

    Returns:
        Advantages [N] in the dtype of `rewards`.

    Raises:
        UserError: bad shape or dtype, unknown `std`, or a reward that is NaN or infinite (leave a
            completion that could not be graded out of its group).
    """
    return _grouped(rewards, group_ids, std, eps)[0]


def zero_variance(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Whether all rewards of a completion's group are equal: bool [N], arguments as above.

    Such a group has no advantage, and without KL and entropy terms no gradient (DAPO,
    arXiv 2503.14476, section 3.2, samples such prompts anew).
    """
    return _grouped(rewards, group_ids, "none", 0.0)[1]


def _grouped(rewards: Tensor, group_ids: Tensor, std: str, eps: float) -> tuple[Tensor, Tensor]:
    check.one_of("std", std, ("population", "sample", "none"))
    if not rewards.is_floating_point() or rewards.dim() != 1:
        raise UserError(f"rewards must be a float tensor [N], got {check.describe(rewards)}")
    if group_ids.is_floating_point() or group_ids.shape != rewards.shape:
        raise UserError(
            f"group_ids must be integers {list(rewards.shape)}, got {check.describe(group_ids)}"
        )
    check.one_device(rewards=rewards, group_ids=group_ids)
    return _group_advantage(rewards, group_ids, std, float(eps))


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
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    ratio: str = "token",
    importance_weights: Tensor | None = None,
    max_tokens: int | None = None,
    kl: str = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss, the value to minimise: -J of DeepSeek-R1 (arXiv 2501.12948), equation (1).

    J = 1/G sum_i 1/|o_i| sum_t [ min(rho_it A_i, clip(rho_it, 1-clip_low, 1+clip_high) A_i)
                                  - beta (pi_ref/pi - log(pi_ref/pi) - 1)_it ],  rho = pi / pi_old

    Where it differs from the paper: equation (1) is written with the probability of the whole
    completion; like the GRPO paper (arXiv 2402.03300, equation 3) this takes the ratio and the KL
    estimate k3 (equation 2) per token and their mean over the completion.  Everything else of the
    default is the paper's: mean over sequences of each one's token mean, symmetric clip.

    An empty completion contributes 0 and counts as a sequence.  What lies under the mask, NaN and
    infinities included, reaches neither the loss nor a gradient.  Only `logp` has a gradient: the
    old and reference policies are constants.

    Args:
        logp, old_logp, ref_logp: [B, S] log-probs of the sampled tokens under the policy, the
            policy before this update, and the reference; `ref_logp` may be None when `beta` is 0.
        advantages: [B].
        mask: [B, S], non-zero on completion tokens.
        clip_low, clip_high: the clip is [1 - clip_low, 1 + clip_high]; a higher `clip_high` is
            DAPO's asymmetric clip (arXiv 2503.14476, equation 10).
        beta: weight of the KL estimate.
        normalizer: "sequence" (the paper): each sequence's token mean, then 1/num_sequences.
            "token": all tokens alike, 1/num_tokens (DAPO, equation 12).  "constant": token sums,
            1/(num_sequences * max_tokens) (Dr. GRPO, arXiv 2503.20783).
        num_sequences, num_tokens: sequences and completion tokens of the whole global batch
            (default: of this call).  Pass them when a batch is cut into micro-batches or spread
            over ranks: losses, gradients and metrics of the pieces then *add up* to the whole's.
        ratio: "token"; "sequence": rho_i = exp(mean_t(log pi - log pi_old)) for every token of the
            sequence (GSPO, arXiv 2507.18071, equation 7); "completion": the whole completion's
            pi(o_i|q) / pi_old(o_i|q), equation (1) to the letter.
        importance_weights: [B, S], constants that multiply the policy term (not the KL), such as
            min(pi_old / pi_generator, C) of truncated importance sampling.
        max_tokens: the constant of "constant": the completion token budget.
        kl: "k3", equation (2); "k3_unbiased": rho k3, off-policy samples weighed back
            (DeepSeek-V3.2, arXiv 2512.02556, section 3.1); "k2": log(pi_ref/pi)^2 / 2, whose
            gradient is the KL's in expectation on policy.

    Returns:
        The loss (0-d, float32 at least) and detached 0-d metrics, each a per-token mean over
        `num_tokens` and so additive like the loss: "ratio", "clip_fraction" (the clip is active)
        and its parts "clip_low_fraction" and "clip_high_fraction", and "kl" (k3, where `ref_logp`
        is given).

    Raises:
        UserError: shapes that disagree, an unknown option, a missing `ref_logp` or `max_tokens`.
    """
    check.objective(
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        kl=kl,
        normalizer=normalizer,
        max_tokens=max_tokens,
        ref_logp=ref_logp,
    )
    check.one_of("ratio", ratio, ("token", "sequence", "completion"))
    _fits(
        logp,
        advantages,
        old_logp=old_logp,
        ref_logp=ref_logp,
        mask=mask,
        importance_weights=importance_weights,
    )
    live = mask.bool()
    num_tokens = at_least_one(live.sum() if num_tokens is None else num_tokens)
    share = token_share(
        live.sum(1, keepdim=True),
        normalizer,
        num_sequences=len(logp) if num_sequences is None else num_sequences,
        num_tokens=num_tokens,
        max_tokens=max_tokens,
    ).to(torch.promote_types(logp.dtype, torch.float32))
    loss, _, sums = _grpo_loss(
        logp,
        old_logp.detach(),
        None if ref_logp is None else ref_logp.detach(),
        advantages.detach(),
        live,
        torch.where(live, share, 0),
        None if importance_weights is None else importance_weights.detach(),
        *(ratio, float(clip_low), float(clip_high), float(beta), kl),
    )
    metrics = dict(zip(METRICS, (sums / num_tokens).unbind(), strict=True))
    if ref_logp is None:
        del metrics["kl"]
    return loss, metrics


def token_share(
    lengths: Tensor,
    normalizer: str,
    *,
    num_sequences: int | Tensor,
    num_tokens: int | Tensor,
    max_tokens: int | None,
) -> Tensor:
    """Weight of one token's term in the loss, for a token of a sequence of each of `lengths`."""
    if normalizer == "token":
        return 1 / (at_least_one(num_tokens) * torch.ones_like(lengths, dtype=torch.float64))
    over = (
        lengths.clamp(min=1) if normalizer == "sequence" else torch.full_like(lengths, max_tokens)
    )
    return 1 / (over.double() * at_least_one(num_sequences))


def at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _fits(logp: Tensor, advantages: Tensor, **per_token: Tensor | None) -> None:
    """Refuses tensors of `grpo_loss` that disagree."""
    if logp.dim() != 2 or not logp.is_floating_point():
        raise UserError(f"logp must be a float tensor [B, S], got {check.describe(logp)}")
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != logp.shape:
            raise UserError(
                f"{name} must be {list(logp.shape)} like logp, got {check.describe(tensor)}"
            )
    if advantages.shape != logp.shape[:1]:
        raise UserError(f"advantages must be [{len(logp)}], got {check.describe(advantages)}")
    check.one_device(logp=logp, advantages=advantages, **per_token)
