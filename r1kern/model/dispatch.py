"""Tokens to the ranks of their experts and back, for Megatron's `MoELayer`.

Shape legend: T tokens of this rank, H hidden, K experts per token, R rows this rank computes, E
experts, e of them on each of P expert-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from r1kern import ops


class Dispatcher(MoETokenDispatcher):
    """Permute by expert, all-to-all, permute by local expert; the same backwards.

    Takes the sparse `ops.Routing` where Megatron's own dispatchers take dense [T, E] maps of
    probabilities and choices.  The weights travel with the rows and are applied by the experts.
    The counts go to the host: the all-to-all and the experts' products need them there.
    """

    def __init__(self, num_local_experts, config, pg_collection):
        super().__init__(config, pg_collection)
        assert self.tp_size == 1, "experts are not sharded by tensor parallelism"
        self.num_local_experts = num_local_experts

    def dispatch_preprocess(self, tokens, routing, weights):
        """[..., H], Routing, weights [T, K] -> rows [T K, H] sorted by expert, weights [T K]."""
        self.shape, self.routing = tokens.shape, routing
        rows = ops.permute(tokens.flatten(0, -2), routing)
        return rows, weights.flatten().index_select(0, routing.order)

    def token_dispatch(self, rows, weights):
        """To the ranks of the experts; rows arrive by source rank, then by local expert."""
        counts = self.routing.counts.view(self.ep_size, -1)
        arriving = all_to_all(self.ep_group, counts)  # [P, e] from each source rank
        self.by_source = arriving.cpu()
        self.sent, self.arrived = counts.sum(1).tolist(), self.by_source.sum(1).tolist()
        return (all_to_all(self.ep_group, x, self.arrived, self.sent) for x in (rows, weights))

    def dispatch_postprocess(self, rows, weights):
        """Rows sorted by local expert [R, H], rows of each expert, weights [R]."""
        self.by_expert = _regrouped(self.by_source, rows.device)
        if self.by_expert is not None:
            rows = ops.permute(rows, self.by_expert)
            weights = ops.permute(weights[:, None], self.by_expert)[:, 0]
        return rows, self.by_source.sum(0), weights

    def combine_preprocess(self, rows):
        return rows if self.by_expert is None else ops.unpermute(rows, self.by_expert)

    def token_combine(self, rows):
        return all_to_all(self.ep_group, rows, self.sent, self.arrived)

    def combine_postprocess(self, rows):
        """[T K, H] -> [..., H], the sum over each token's experts."""
        return ops.unpermute(rows, self.routing).view(self.shape)


def _regrouped(by_source: torch.Tensor, device: torch.device) -> ops.Permutation | None:
    """From [source rank][expert] to [expert][source rank], sizes [P, e]; None if nothing moves."""
    if 1 in by_source.shape:
        return None
    sizes, sizes_there = by_source.flatten(), by_source.T.flatten()
    first_there = (sizes_there.cumsum(0) - sizes_there).view_as(by_source.T).T.flatten()
    shift = first_there - (sizes.cumsum(0) - sizes)
    rows = torch.arange(int(sizes.sum()), dtype=torch.int32)
    slots = rows + shift.int().repeat_interleave(sizes)
    order = torch.empty_like(slots).index_copy_(0, slots.long(), rows)
    return ops.Permutation(slots[:, None].to(device), order.to(device))
