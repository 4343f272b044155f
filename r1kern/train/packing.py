"""Sequences -> micro-batches: packed to a token budget, balanced by FLOPs over replicas and turns.

The replicas go through their micro-batches in lockstep (expert parallelism makes them wait for each
other in every layer), so that what counts is that the micro-batches of one turn cost alike.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from r1kern import _C
from r1kern.errors import UserError
from r1kern.hf.flops import ModelFlops
from r1kern.types import PackedBatch, Sequence


@dataclass(frozen=True)
class Plan:
    """Which sequence of a global batch goes where.

    Attributes:
        sequences: the global batch.
        turns: for each turn and data-parallel rank the indices of a micro-batch's sequences.
        costs: float64 [N], of each sequence.
        multiple: rows are padded to a multiple of it.
    """

    sequences: Seq[Sequence]
    turns: list[list[np.ndarray]]
    costs: np.ndarray
    multiple: int

    def batches(self, dp_rank: int, device: torch.device | str = "cpu") -> list[PackedBatch]:
        """The micro-batches of one rank, dearest first."""
        return [
            _lay_out([self.sequences[i] for i in turn[dp_rank]], self.multiple, device)
            for turn in self.turns
        ]

    def waste(self) -> dict[str, float]:
        """What the step's metrics tell: `pack/padding`, the share of rows that are padding, and
        `pack/imbalance`, the cost of every turn's dearest micro-batch over the mean one, less 1."""
        rows = np.array([[sum(len(self.sequences[i]) for i in b) for b in t] for t in self.turns])
        padding = sum(_padding(r, self.multiple) for r in rows.flat)
        return {
            "pack/padding": padding / float(rows.sum() + padding),
            "pack/imbalance": imbalance(_turn_costs(self.turns, self.costs)),
        }


def plan_batches(
    sequences: Seq[Sequence],
    *,
    budget: int,
    dp: int,
    multiple: int = 1,
    hf: PretrainedConfig | None = None,
) -> Plan:
    """Every sequence of a global batch to a turn and a rank: none is dropped or cut.

    A function of its arguments alone: every rank finds the same plan.

    Args:
        sequences: the global batch.
        budget: most rows of a micro-batch, its padding to `multiple` not counted.
        dp: data-parallel size; every rank gets the same number of micro-batches.
        multiple: rows are padded to a multiple of it (the TP size, for sequence parallelism).
        hf: the model whose FLOPs are balanced; rows are without it.

    Raises:
        UserError: a sequence is longer than the budget.
    """
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    if lengths.size and int(lengths.max()) > budget:
        raise UserError(
            f"a sequence of {int(lengths.max())} tokens exceeds train.tokens_per_microbatch="
            f"{budget}: raise it or lower rollout.max_tokens"
        )
    costs = lengths
    if hf is not None:
        completions = np.array([len(s.completion_ids) for s in sequences], dtype=np.int64)
        costs = ModelFlops.of(hf).sequence(lengths, completions)
    costs = costs.astype(np.float64)
    return Plan(sequences, balance(lengths, costs, budget, dp), costs, multiple)


def pack(
    sequences: Seq[Sequence],
    *,
    budget: int,
    dp: int,
    dp_rank: int,
    multiple: int = 1,
    hf: PretrainedConfig | None = None,
    device: torch.device | str = "cpu",
) -> list[PackedBatch]:
    """One rank's micro-batches of a global batch; see `plan_batches`."""
    plan = plan_batches(sequences, budget=budget, dp=dp, multiple=multiple, hf=hf)
    return plan.batches(dp_rank, device)


def balance(lengths: np.ndarray, costs: np.ndarray, budget: int, dp: int) -> list[list[np.ndarray]]:
    """As few turns as first-fit-decreasing finds, of micro-batches that cost alike.

    The better of two: by cost (longest processing time first, within the budget), which may find
    no room where the micro-batches are nearly full, and by rows, which always does.

    Args:
        lengths: int64 [N], rows of each sequence, none above `budget`.
        costs: float64 [N].
        budget: most rows of a micro-batch.
        dp: micro-batches of a turn.

    Returns:
        Indices into `lengths` by turn and rank, dearest turn first; at least one turn.
    """
    bins = _C.pack_ffd(lengths, budget)
    count = max(1, -(-(int(bins.max(initial=-1)) + 1) // dp)) * dp
    by_rows = _turns(_even_rows(lengths, bins, budget, count), costs, count, dp)
    bins = _C.pack_even(lengths, costs, budget, count)
    if len(bins) < len(lengths):
        return by_rows
    by_cost = _turns(bins, costs, count, dp)
    return min(by_cost, by_rows, key=lambda turns: imbalance(_turn_costs(turns, costs)))


def imbalance(costs: np.ndarray) -> float:
    """Cost [turns, ranks] that lockstep adds: the sum of the turns' dearest over the mean rank's
    sum, less 1.  No less than the slowest rank over the mean, less 1."""
    return float(costs.max(1).sum() * costs.shape[1] / costs.sum() - 1) if costs.any() else 0.0


def _even_rows(lengths: np.ndarray, bins: np.ndarray, budget: int, count: int) -> np.ndarray:
    """MULTIFIT (Coffman, Garey and Johnson 1978): the least budget that `count` bins hold."""
    low, high = max(int(lengths.max(initial=1)), int(lengths.sum()) // count), budget
    while low < high:
        middle = (low + high) // 2
        tried = _C.pack_ffd(lengths, middle)
        if tried.max(initial=-1) < count:
            bins, high = tried, middle
        else:
            low = middle + 1
    return bins


def _turns(bins: np.ndarray, costs: np.ndarray, count: int, dp: int) -> list[list[np.ndarray]]:
    """Bins of like cost meet in a turn; which rank has the dearest alternates."""
    ends = np.cumsum(np.bincount(bins, minlength=count))[:-1]
    members = np.split(np.argsort(bins, kind="stable"), ends)
    loads = np.bincount(bins, weights=costs, minlength=count)
    order = np.argsort(-loads, kind="stable").reshape(-1, dp)
    order[1::2] = order[1::2, ::-1]
    return [[members[b] for b in turn] for turn in order]


def _turn_costs(turns: list[list[np.ndarray]], costs: np.ndarray) -> np.ndarray:
    return np.array([[costs[b].sum() for b in turn] for turn in turns])


def _padding(rows: int, multiple: int) -> int:
    """Rows of padding; a micro-batch without sequences consists of it."""
    return int(max(-rows % multiple, multiple if not rows else 0))


def _lay_out(sequences: list[Sequence], multiple: int, device) -> PackedBatch:
    """One micro-batch; an empty list gives rows of padding only."""
    tokens, positions, starts = [], [], [0]
    rows, targets, place = [], [], []
    longest = max((len(s.completion_ids) for s in sequences), default=0)
    for b, sequence in enumerate(sequences):
        ids = (*sequence.prompt_ids, *sequence.completion_ids)
        first = starts[-1] + len(sequence.prompt_ids) - 1
        count = len(sequence.completion_ids)
        tokens += ids[:-1]
        positions += range(len(sequence))
        rows += range(first, first + count)
        targets += sequence.completion_ids
        place += range(b * longest, b * longest + count)
        starts.append(starts[-1] + len(sequence))
    padding = _padding(len(tokens), multiple)
    if padding:
        tokens += [0] * padding
        positions += range(padding)
        starts.append(starts[-1] + padding)

    def tensor(values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype, device=device)

    place = tensor(place)
    shape = (len(sequences), longest)
    mask = torch.zeros(shape, device=device)
    mask.view(-1)[place] = 1.0
    sampled = torch.zeros(shape, device=device)
    logps = [p for s in sequences for p in s.sampled_logps]
    if logps:
        sampled.view(-1)[place] = tensor(logps, torch.float32)
    return PackedBatch(
        tokens=tensor(tokens),
        positions=tensor(positions),
        cu_seqlens=tensor(starts, torch.int32),
        rows=tensor(rows),
        targets=tensor(targets),
        place=place,
        mask=mask,
        advantages=tensor([s.advantage for s in sequences], torch.float32),
        sampled_logps=sampled,
    )
