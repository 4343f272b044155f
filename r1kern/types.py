"""The records that flow through the engine: `Prompt -> Rollout -> PackedBatch`.

Shape legend: T packed tokens of a micro-batch, B sequences in it, G completions of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Prompt:
    """One problem, rendered and tokenised.

    Attributes:
        id: name of the problem, unique in its data set.
        ids: prompt token ids, template included.
        answer: the gold answer, raw text.
        text: the rendered prompt.
    """

    id: str
    ids: tuple[int, ...]
    answer: str
    text: str


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        ids: sampled token ids, the stop token included when there is one.
        logps: log-probability of each sampled token under the generator, same length as `ids`.
        text: `ids` decoded without special tokens.
        finish: "stop" (a stop token was sampled) or "length" (the token budget ran out).
    """

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    text: str
    finish: str


@dataclass(frozen=True)
class Score:
    """Rewards of one completion, each term by name.

    Attributes:
        terms: unweighted reward terms.
        total: the weighted sum that the advantage is computed from.
        failure: why a grader could not judge (then the completion is left out of the update and
            counted apart), or None.
    """

    terms: dict[str, float]
    total: float
    failure: str | None = None


@dataclass(frozen=True)
class Rollout:
    """A group of G completions of one prompt, sampled from one version of the weights.

    Attributes:
        prompt: the problem.
        completions: G samples.
        weight_version: number of optimizer updates the sampling weights had received.
        scores: one `Score` per completion once graded, empty before.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    weight_version: int
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Sequence:
    """One prompt and completion as the trainer sees it.

    Attributes:
        prompt_ids, completion_ids: token ids.
        advantage: A_i of the group-relative policy (ignored by SFT).
        sampled_logps: generator log-prob of each completion token (empty in SFT).
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float = 0.0
    sampled_logps: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Rows it takes in a packed batch: every token but the last predicts the next one."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


@dataclass(frozen=True)
class PackedBatch:
    """Variable-length sequences laid end to end (Megatron's thd layout): one micro-batch.

    Row t holds a token and predicts the next token of its own sequence; padding rows, if any, form
    one last sequence of their own whose mask is 0.

    Attributes:
        tokens: int64 [T], inputs.
        targets: int64 [T], the token that follows each input.
        positions: int64 [T], position within the sequence.
        cu_seqlens: int32 [B' + 1], offsets of the sequences (the padding sequence included).
        mask: bool [T], True where the target is a completion token.
        rows: int64 [B, S], index into T of each sequence's completion rows, 0 where there is none.
        row_mask: float32 [B, S], 1 where `rows` is real; S is the longest completion.
        advantages: float32 [B].
        sampled_logps: float32 [B, S], generator log-probs, 0 where there is none.
        extra: per-completion-token float32 [B, S] tensors added on the way ("old_logps",
            "ref_logps").
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    row_mask: torch.Tensor
    advantages: torch.Tensor
    sampled_logps: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
