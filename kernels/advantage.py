"""Group-relative advantages: the custom op.

Shape legend: N completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kern.errors import UserError


@torch.library.custom_op("r1kern::group_advantage", mutates_args=(), device_types="cpu")
def group_advantage(
    rewards: Tensor, group_ids: Tensor, std: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Advantages [N], and whether all rewards of the group are equal, bool [N]."""
    _refuse_ungraded(rewards)
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    r = rewards.double()
    zeros = r.new_zeros(len(size))
    # Counted from the group's least reward, equal rewards are exact zeros: no rounding of the mean
    # is left for a standard deviation near 0 to blow up.
    r = r - zeros.scatter_reduce(0, group, r, "amin", include_self=False)[group]
    flat = zeros.scatter_reduce(0, group, r, "amax", include_self=False)[group] == 0
    r = r - (zeros.index_add(0, group, r) / size)[group]
    if std != "none":
        degrees = size - int(std == "sample")
        deviation = (zeros.index_add(0, group, r * r) / degrees).sqrt()[group]
        r = r / (deviation + eps)
    return torch.where(flat, 0, r).to(rewards.dtype), flat


@group_advantage.register_kernel("cuda")
def _(rewards, group_ids, std, eps):
    from r1kern.kernels import advantage_triton

    _refuse_ungraded(rewards)
    return advantage_triton.group_advantage(rewards, group_ids, std, eps)


@group_advantage.register_fake
def _(rewards: Tensor, group_ids: Tensor, std: str, eps: float) -> tuple[Tensor, Tensor]:
    out = rewards.new_empty(rewards.shape)
    return out, torch.empty_like(out, dtype=torch.bool)


def _refuse_ungraded(rewards: Tensor) -> None:
    finite = rewards.isfinite()
    if not finite.all():
        i = int((~finite).nonzero()[0])
        raise UserError(
            f"rewards[{i}] is {rewards[i].item()}: leave completions that could not be graded out"
        )
