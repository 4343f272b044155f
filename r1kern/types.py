"""The records that flow through the engine: `Prompt -> Rollout -> PackedBatch`.

Shape legend: T packed tokens of a micro-batch, B sequences in it, N completion tokens in it, S the
longest completion, G completions of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TASKS = ("math", "choice", "code", "reference", "general")


@dataclass(frozen=True)
class Prompt:
    """One problem, rendered and tokenised.

    Attributes:
        id: name of the problem, unique in its data set.
        ids: prompt token ids, template included.
        answer: the gold answer, raw text; "" where there is none.
        text: the rendered prompt.
        question: the problem as its record has it, for a judge to read.
        task: what judges an answer: "math" and "choice" the mathematics grader, "code" the tests,
            "reference" a judge that is given `answer`, "general" preferences alone.
        language: that the answer should be in ("en", "zh", ...), "" where the record says nothing.
        tests: of a program, as `rewards.code.run_tests` takes them, each as JSON.
    """

    id: str
    ids: tuple[int, ...]
    answer: str
    text: str
    question: str = ""
    task: str = "math"
    language: str = ""
    tests: tuple[str, ...] = ()


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

    Row t holds a token and predicts the next token of its own sequence.  Padding rows, if any, form
    one last sequence of their own, of which no completion token comes.

    Attributes:
        tokens: int64 [T], inputs.
        positions: int64 [T], position within the sequence.
        cu_seqlens: int32 [B + 1] offsets of the sequences (one more when there is padding).
        rows: int64 [N], the rows that predict a completion token, sequence after sequence.
        targets: int64 [N], the completion tokens they predict.
        place: int64 [N], where each of them lies in the flattened [B, S] grid of completions.
        mask: float32 [B, S], 1 where there is a completion token.
        advantages: float32 [B].
        sampled_logps: float32 [B, S], generator log-probs, 0 under the mask.
        old_logps, ref_logps: float32 [B, S], trainer log-probs once computed.
        values, returns, token_advantages: float32 [B, S], PPO's, once computed: the critic's values
            before the update, what it is to learn, and the advantage of each token.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    sampled_logps: torch.Tensor
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    token_advantages: torch.Tensor | None = None

    @property
    def sequence_ids(self) -> torch.Tensor:
        """int64 [N], the sequence of each completion token."""
        return self.place // max(1, self.mask.shape[1])

    def flat(self, grid: torch.Tensor | None) -> torch.Tensor | None:
        """[B, S] values -> [N] of the completion tokens; None stays None."""
        return None if grid is None else grid.flatten().index_select(0, self.place)

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """[N] values of completion tokens -> [B, S], 0 under the mask; differentiable."""
        flat = values.new_zeros(self.mask.numel())
        return flat.index_copy(0, self.place, values).view_as(self.mask)
