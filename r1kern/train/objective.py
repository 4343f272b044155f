"""From graded rollouts to the loss: advantages, denominators, the loss of a micro-batch."""

from __future__ import annotations

import torch

from r1kern import ops
from r1kern.config import GRPO as Options
from r1kern.train.head import Head
from r1kern.types import PackedBatch, Rollout, Sequence


def to_sequences(rollouts: list[Rollout], options: Options) -> list[Sequence]:
    """Completions with their group-relative advantage, equation (3).

    A completion whose grader failed is left out, of its group's mean too.
    """
    kept = [
        (group, rollout.prompt, completion, score.total)
        for group, rollout in enumerate(rollouts)
        for completion, score in zip(rollout.completions, rollout.scores, strict=True)
        if score.failure is None
    ]
    advantages = ops.group_advantage(
        torch.tensor([k[3] for k in kept], dtype=torch.float32),
        torch.tensor([k[0] for k in kept], dtype=torch.int64),
        std=options.advantage_std,
    )
    return [
        Sequence(prompt.ids, completion.ids, advantage, completion.logps)
        for (_, prompt, completion, _), advantage in zip(kept, advantages.tolist(), strict=True)
        if not (options.drop_truncated and completion.finish == "length")
    ]


def counts(sequences: list[Sequence]) -> dict[str, int]:
    """The global denominators of a batch of sequences."""
    return {
        "num_sequences": len(sequences),
        "num_tokens": sum(len(s.completion_ids) for s in sequences),
    }


def split(rollouts: list[Rollout], parts: int) -> list[list[Rollout]]:
    """Equal runs of whole groups, one for each update."""
    size = len(rollouts) // parts
    return [rollouts[i * size : (i + 1) * size] for i in range(parts)]


def grpo_step_loss(
    head: Head,
    batch: PackedBatch,
    *,
    options: Options,
    denominators: dict[str, int],
    trained_tokens: int,
    max_tokens: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The fused head and loss on a packed micro-batch, with the mismatch metrics.

    Args:
        denominators: `counts` of the global batch.
        trained_tokens: completion tokens of the sequences that were packed, over which the metrics
            are means.
        max_tokens: completion budget, the constant of `normalizer="constant"`.
    """
    by_token = options.ratio == "token"
    fused = ops.linear_grpo_loss if by_token else ops.linear_gspo_loss
    own = {"entropy_coef": options.entropy_coef} if by_token else {"ratio": options.ratio}
    loss, metrics = fused(
        head.hidden,
        head.weight,
        head.targets,
        batch.flat(batch.old_logps),
        batch.flat(batch.ref_logps),
        batch.advantages,
        batch.sequence_ids,
        sampled_logp=batch.flat(batch.sampled_logps),
        importance_cap=options.importance_cap,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        beta=options.beta,
        kl=options.kl,
        normalizer=options.normalizer,
        max_tokens=max_tokens,
        **own,
        **head.options,
        **denominators,
    )
    scale = denominators["num_tokens"] / max(1, trained_tokens)
    means = {k: v * scale for k, v in metrics.items() if not k.startswith("max_")}
    return loss, metrics | means
