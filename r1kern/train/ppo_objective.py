"""PPO's two losses on a packed micro-batch: the policy's and the critic's."""

from __future__ import annotations

import torch

from r1kern import ops
from r1kern.config import GRPO as Options
from r1kern.train.head import Head
from r1kern.types import PackedBatch, Rollout, Sequence


def to_rewarded(rollouts: list[Rollout], options: Options) -> list[Sequence]:
    """Completions with their reward where GRPO's have the advantage of their group.

    A completion whose grader failed is left out.
    """
    return [
        Sequence(rollout.prompt.ids, completion.ids, score.total, completion.logps)
        for rollout in rollouts
        for completion, score in zip(rollout.completions, rollout.scores, strict=True)
        if score.failure is None and not (options.drop_truncated and completion.finish == "length")
    ]


def ppo_policy_loss(
    head: Head, batch: PackedBatch, *, options: Options, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped objective (arXiv 1707.06347, equation 7), mean over the tokens of the batch.

    The fused head and loss of GRPO, every token a sequence of its own with its own advantage.  The
    KL is in the advantages (see `advantage.token_rewards`): where there are reference log-probs,
    they are for the metric alone.

    Args:
        num_tokens: completion tokens of the global batch.
    """
    return ops.linear_grpo_loss(
        head.hidden,
        head.weight,
        head.targets,
        batch.flat(batch.old_logps),
        batch.flat(batch.ref_logps),
        batch.flat(batch.token_advantages),
        torch.arange(len(batch.targets), device=batch.targets.device),
        sampled_logp=batch.flat(batch.sampled_logps),
        importance_cap=options.importance_cap,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        beta=0.0,
        entropy_coef=options.entropy_coef,
        normalizer="token",
        num_tokens=num_tokens,
        **head.options,
    )


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 of each token.

    PPO's squared error (arXiv 1707.06347, equation 9) with the clip of its authors' code, which
    lets a value that has moved by more than `clip` learn only while that makes the error smaller
    than it was at the border.

    Args:
        values: [N], has the gradient.
        old: [N], before the update.
        returns: [N], what they are to be.
        clip: None: no clip.

    Returns:
        Losses [N], and where the clip is active, bool [N].
    """
    error = (values - returns).square()
    if clip is None:
        return error / 2, torch.zeros_like(error, dtype=torch.bool)
    clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
    return torch.maximum(error, clipped) / 2, clipped > error


def critic_loss(
    head: Head, batch: PackedBatch, *, clip: float | None, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`value_loss`, mean over the tokens of the global batch."""
    losses, active = value_loss(
        head.values(), batch.flat(batch.values), batch.flat(batch.returns), clip
    )
    scale = 1 / max(1, num_tokens)
    return losses.sum() * scale, {"clip_fraction": active.sum() * scale}
