"""From graded rollouts to PPO's two losses: token advantages, the policy's loss, the critic's."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core import parallel_state as mpu

from r1kern import ops
from r1kern.config import GRPO as Options
from r1kern.config import PPO
from r1kern.train.advantage import Moments, explained_variance, gae, token_rewards
from r1kern.train.head import Head, ValueHead
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


def with_advantages(
    updates: list[list[PackedBatch]], options: PPO, beta: float
) -> tuple[list[list[PackedBatch]], dict[str, float]]:
    """This replica's micro-batches of a step's updates with the advantages and returns of tokens.

    Args:
        updates: with `values`, and where `beta` is not 0 with `old_logps` and `ref_logps`.
        beta: weight of the KL penalty.

    Returns:
        They, and metrics over the tokens of all replicas.
    """
    found = [[_estimate(batch, options, beta) for batch in update] for update in updates]
    advantages, metrics = _moments([batch for update in found for batch in update])
    if options.whiten:
        found = [[_whitened(batch, advantages) for batch in update] for update in found]
    return found, metrics


def _estimate(batch: PackedBatch, options: PPO, beta: float) -> PackedBatch:
    rewards = token_rewards(batch.advantages, batch.mask, batch.old_logps, batch.ref_logps, beta)
    advantages, returns = gae(
        rewards, batch.values, batch.mask, gamma=options.gamma, lam=options.lam
    )
    return dataclasses.replace(batch, token_advantages=advantages, returns=returns)


def _whitened(batch: PackedBatch, advantages: Moments) -> PackedBatch:
    white = advantages.whiten(batch.token_advantages, batch.mask)
    return dataclasses.replace(batch, token_advantages=white)


def _moments(batches: list[PackedBatch]) -> tuple[Moments, dict[str, float]]:
    """The advantages' moments, and what a step's metrics tell."""

    def moments(of) -> Moments:
        group = mpu.get_data_parallel_group()
        return Moments([batch.flat(of(batch)) for batch in batches], group)

    advantages, returns = moments(lambda b: b.token_advantages), moments(lambda b: b.returns)
    values, errors = moments(lambda b: b.values), moments(lambda b: b.returns - b.values)
    metrics = {
        "value/mean": values.mean,
        "value/return": returns.mean,
        "value/explained_variance": explained_variance(errors, returns),
        "advantage/mean": advantages.mean,
        "advantage/std": advantages.variance**0.5,
    }
    if batches[0].ref_logps is not None:
        metrics["kl_penalty"] = moments(lambda b: b.old_logps - b.ref_logps).mean
    return advantages, metrics


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
    head: ValueHead, batch: PackedBatch, *, clip: float | None, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`value_loss`, mean over the tokens of the global batch."""
    losses, active = value_loss(
        head.values(), batch.flat(batch.values), batch.flat(batch.returns), clip
    )
    scale = 1 / max(1, num_tokens)
    return losses.sum() * scale, {"clip_fraction": active.sum() * scale}
