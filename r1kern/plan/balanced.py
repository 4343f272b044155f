"""Balanced routing: the rows of every expert, which the host must know and fake tensors lack."""

from __future__ import annotations

import copy

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from r1kern import ops


def balanced(dispatcher):
    """The dispatcher with equal counts of rows for every expert, known to the host."""
    from r1kern.model import dispatch

    class Balanced(dispatch.Dispatcher):
        """Every expert of every rank gets the same number of rows."""

        def token_dispatch(self, rows, weights):
            ranks, experts = self.ep_size, self.num_local_experts
            with unset_fake_temporarily():
                even = torch.arange(ranks * experts + 1) * len(rows) // (ranks * experts)
                self.by_source = even.diff().view(ranks, experts)
                self.sent = self.arrived = self.by_source.sum(1).tolist()
            return (
                dispatch.all_to_all(self.ep_group, x, self.arrived, self.sent)
                for x in (rows, weights)
            )

        def dispatch_postprocess(self, rows, weights):
            with unset_fake_temporarily():
                self.by_expert = dispatch._regrouped(self.by_source, rows.device)
                rows_per_expert = self.by_source.sum(0)
            if self.by_expert is not None:
                rows = ops.permute(rows, self.by_expert)
                weights = ops.permute(weights[:, None], self.by_expert)[:, 0]
            return rows, rows_per_expert, weights

    other = copy.copy(dispatcher)
    other.__class__ = Balanced
    return other
