"""Per-token rewards, generalised advantage estimation, whitening: what PPO needs before its update.

Shape legend: B sequences, S longest completion.  Grids are left-aligned, as `PackedBatch` has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def token_rewards(
    rewards: Tensor, mask: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, beta: float
) -> Tensor:
    """Reward of every token: r_t = -beta log(pi_old / pi_ref), and the completion's at its last.

    The KL penalty is in the reward and so in the advantage, as InstructGPT has it (arXiv
    2203.02155, equation 2) and as the GRPO paper writes PPO (arXiv 2402.03300, equation 2), by the
    estimate k1.  GRPO's is k3, in the loss, with a gradient of its own.

    Args:
        rewards: [B], of the completions.
        mask: [B, S], non-zero on completion tokens.
        old_logp, ref_logp: [B, S]; may be None when `beta` is 0.

    Returns:
        float32 [B, S], 0 under the mask.
    """
    live = mask.bool()
    last = live.cumsum(1) == live.sum(1, keepdim=True)
    found = torch.where(live & last, rewards[:, None].float(), 0)
    if beta:
        found = found - beta * torch.where(live, old_logp - ref_logp, 0)
    return found


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equations 11 to 16), all tokens at once.

    delta_t = r_t + gamma V_(t+1) - V_t,  A_t = sum_l (gamma lam)^l delta_(t+l),  returns A_t + V_t

    V is 0 after the last token, that of a truncated completion included: its reward was given for
    the text as it stands.  The sums are made by doubling, in log2 S steps.

    Args:
        rewards, values: floating [B, S], of each token and of the state it was sampled in.
        mask: [B, S], non-zero on completion tokens; what lies under it, NaN included, is not read.

    Returns:
        Advantages and returns [B, S] in the dtype of `values`, 0 under the mask; no gradient.
    """
    live = mask.bool()
    rewards, values = (torch.where(live, x.detach(), 0) for x in (rewards, values))
    advantages = rewards + gamma * _ahead(values, 1) - values
    span, decay = 1, gamma * lam
    while span < advantages.shape[1] and decay:
        # Every place holds the sum of `span` terms from there on.
        advantages = advantages + decay**span * _ahead(advantages, span)
        span *= 2
    advantages = torch.where(live, advantages, 0)
    return advantages, advantages + values


def _ahead(x: Tensor, by: int) -> Tensor:
    """x[:, t + by] at t, 0 where there is none."""
    return torch.nn.functional.pad(x[:, by:], (0, by))


class Moments:
    """Mean and variance of a quantity over all completion tokens of the global batch.

    Args:
        values: this replica's, one tensor [N] a micro-batch.
        group: of the replicas.
    """

    def __init__(self, values: Sequence[Tensor], group: dist.ProcessGroup):
        own = torch.cat([v.double() for v in values])
        sums = torch.stack([own.new_tensor(len(own)), own.sum(), own.square().sum()])
        dist.all_reduce(sums, group=group)
        count, total, squares = sums.tolist()
        self.mean = total / max(count, 1)
        self.variance = max(squares / max(count, 1) - self.mean**2, 0.0)

    def whiten(self, x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
        """(x - mean) / std, 0 under the mask."""
        return torch.where(mask.bool(), (x - self.mean) / (self.variance + eps) ** 0.5, 0)


def explained_variance(errors: Moments, returns: Moments) -> float:
    """1 - Var(returns - values) / Var(returns): 1 perfect, 0 no better than a constant.

    Returns:
        NaN where all returns are equal.
    """
    return 1 - errors.variance / returns.variance if returns.variance else float("nan")
