"""Sequences -> micro-batches: balanced over data-parallel ranks, packed to a token budget."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from r1kern import _C
from r1kern.errors import UserError
from r1kern.types import PackedBatch, Sequence


def pack(
    sequences: Seq[Sequence],
    *,
    budget: int,
    dp: int,
    dp_rank: int,
    multiple: int = 1,
    device: torch.device | str = "cpu",
) -> list[PackedBatch]:
    """This rank's share of a global batch.

    Every rank passes the same sequences and gets the same number of micro-batches (expert
    parallelism makes them wait for each other).  No sequence is dropped or cut.

    Args:
        sequences: the global batch.
        budget: most packed rows of a micro-batch.
        dp, dp_rank: data-parallel size and rank.
        multiple: rows are padded to a multiple of it (the TP size, for sequence parallelism).

    Raises:
        UserError: a sequence is longer than the budget.
    """
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    if lengths.size and int(lengths.max()) > budget:
        raise UserError(
            f"a sequence of {int(lengths.max())} tokens exceeds train.tokens_per_microbatch="
            f"{budget}: raise it or lower rollout.max_tokens"
        )
    bins, count = balance(lengths, budget, dp)
    return [
        _lay_out([sequences[i] for i in np.flatnonzero(bins == b)], multiple, device)
        for b in range(dp_rank, count, dp)
    ]


def balance(lengths: np.ndarray, budget: int, dp: int) -> tuple[np.ndarray, int]:
    """MULTIFIT (Coffman, Garey and Johnson 1978): even micro-batches within the budget.

    Args:
        lengths: int64 [N], rows of each sequence, none above `budget`.
        budget: most rows of a micro-batch.
        dp: the number of micro-batches is a multiple of it.

    Returns:
        int64 [N] micro-batch of each sequence, and the number of micro-batches (at least `dp`).
    """
    bins = _C.pack_ffd(lengths, budget)
    count = max(1, -(-(int(bins.max(initial=-1)) + 1) // dp)) * dp
    low, high = max(int(lengths.max(initial=1)), int(lengths.sum()) // count), budget
    while low < high:
        middle = (low + high) // 2
        tried = _C.pack_ffd(lengths, middle)
        if tried.max(initial=-1) < count:
            bins, high = tried, middle
        else:
            low = middle + 1
    return bins, count


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
    padding = max(-len(tokens) % multiple, multiple if not tokens else 0)
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
