"""Group-relative advantages of ragged groups: one launch, no sort, nothing read by the host.

A program owns a block of completions and compares their ids with all, block by block, three times:
for the group's bounds, its mean, its deviation.  A batch has thousands of completions at most.

Shape legend: N completions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
COLUMNS = 128
OPTIONS = dict(num_warps=4, num_stages=3)
STD = {"none": 0, "population": 1, "sample": 2}


@triton.jit
def _mates(rewards, ids, own, first, N, COLUMNS: tl.constexpr):
    """Rewards float64 [1, COLUMNS] from `first` on, and whether each is of the group of a row's id
    `own` [ROWS, 1]."""
    j = first + tl.arange(0, COLUMNS)[None, :]
    mate = (j < N) & (tl.load(ids + j, mask=j < N, other=0) == own)
    return tl.load(rewards + j, mask=j < N, other=0.0).to(tl.float64), mate


@triton.jit(do_not_specialize=["N"])
def _group_advantage_kernel(
    rewards, ids, advantages, flat, N, EPS: tl.constexpr, STD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    reward = tl.load(rewards + i, mask=i < N, other=0.0).to(tl.float64)
    own = tl.load(ids + i, mask=i < N, other=0)[:, None]

    least = tl.full([ROWS], float("inf"), tl.float64)
    most = tl.full([ROWS], float("-inf"), tl.float64)
    size = tl.zeros([ROWS], tl.int32)
    for first in range(0, N, COLUMNS):
        r, mate = _mates(rewards, ids, own, first, N, COLUMNS)
        least = tl.minimum(least, tl.min(tl.where(mate, r, float("inf")), 1))
        most = tl.maximum(most, tl.max(tl.where(mate, r, float("-inf")), 1))
        size += tl.sum(mate.to(tl.int32), 1)

    # Counted from the group's least reward, equal rewards are exact zeros: no rounding of the mean
    # is left for a deviation near 0 to blow up.
    total = tl.zeros([ROWS], tl.float64)
    for first in range(0, N, COLUMNS):
        r, mate = _mates(rewards, ids, own, first, N, COLUMNS)
        total += tl.sum(tl.where(mate, r - least[:, None], 0.0), 1)
    mean = total / size
    advantage = reward - least - mean

    if STD > 0:
        squares = tl.zeros([ROWS], tl.float64)
        for first in range(0, N, COLUMNS):
            r, mate = _mates(rewards, ids, own, first, N, COLUMNS)
            d = tl.where(mate, r - least[:, None] - mean[:, None], 0.0)
            squares += tl.sum(d * d, 1)
        deviation = tl.sqrt(squares / tl.maximum(size - (STD == 2), 1))
        advantage = tl.where(deviation > 0, advantage / (deviation + EPS), 0.0)
    equal = least == most
    advantage = tl.where(equal, 0.0, advantage).to(advantages.dtype.element_ty)
    tl.store(advantages + i, advantage, mask=i < N)
    tl.store(flat + i, equal, mask=i < N)


def group_advantage(
    rewards: Tensor, group_ids: Tensor, std: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Advantages of `r1kern.ops.group_advantage`, and where a group's rewards are all equal.

    Args:
        rewards: floating [N], finite.
        group_ids: integer [N].
        std: "population", "sample" or "none".
        eps: added to the deviation.

    Returns:
        Advantages [N] in the dtype of `rewards`, computed in float64, and bool [N].
    """
    N = len(rewards)
    advantages = torch.empty(N, dtype=rewards.dtype, device=rewards.device)
    flat = torch.empty(N, dtype=torch.bool, device=rewards.device)
    if N:
        _group_advantage_kernel[(triton.cdiv(N, ROWS),)](
            rewards.contiguous(), group_ids.contiguous(), advantages, flat, N,
            EPS=eps, STD=STD[std], ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return advantages, flat


def variants():
    """(name, kernel, signature, constexprs, options, aligned) of what the launcher compiles."""
    for dtype in ("fp64", "fp32", "bf16"):
        for ids in ("i64",):
            for std, code in STD.items():
                pointers = dict(
                    rewards=f"*{dtype}", ids=f"*{ids}", advantages=f"*{dtype}", flat="*i1"
                )
                constexprs = dict(EPS=1e-6, STD=code, ROWS=ROWS, COLUMNS=COLUMNS)
                yield (
                    f"group_advantage_{dtype}_{ids}_{std}",
                    _group_advantage_kernel,
                    {**pointers, "N": "i32"},
                    constexprs,
                    OPTIONS,
                    set(pointers),
                )
