"""DeepSeek-V3's mixture of experts by Megatron's plug-in points: router and grouped experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from r1kern import ops
from r1kern.model import balance
from r1kern.model.dispatch import Dispatcher


class MoELayer(moe_layer.MoELayer):
    """Megatron's layer with our dispatcher, which its configuration offers no place for."""

    def __init__(self, config, submodules=None, layer_number=None, pg_collection=None):
        super().__init__(config, submodules, layer_number, pg_collection)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.token_dispatcher = Dispatcher(self.num_local_experts, config, groups)

    def forward(self, hidden_states, intermediate_tensors=None, padding_mask=None):
        """[s, b, h] -> [s, b, h] and no bias.

        Args:
            padding_mask: what Megatron carries here for us, the sequence of each row, int64
                [b, s of all sequence-parallel ranks], -1 on padding.
        """
        assert intermediate_tensors is None, "CUDA graphs of parts of the layer are not supported"
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._mix, False, hidden_states, padding_mask), None
        return self._mix(hidden_states, padding_mask), None

    def _mix(self, hidden, sequence_ids):
        shared = self.shared_experts_compute(hidden)
        weights, routing = self.router(hidden, sequence_ids)
        rows, weights = self.token_dispatcher.dispatch_preprocess(hidden, routing, weights)
        rows, _ = self.routed_experts_compute(*self.dispatch(rows, weights))
        return self.postprocess(self.combine(rows), shared)


class Router(TopKRouter):
    """Sigmoid, group-limited, bias-corrected routing through `ops.route`.

    Megatron scores a group by its top `topk // topk_groups` experts, DeepSeek-V3 by its top two;
    they agree on the 671B shape only.

    Attributes:
        counts: int64 [E], tokens that chose each expert since the last `balance.finish_update`,
            padding left out; only passes with a gradient count.
        balance_weight: of each sequence's balance loss; 0 leaves it out.
        balance_loss: float32 0-d, this rank's share of it since then, weighted.
    """

    tape = None  # `replay.Recorder` or `replay.Player` of the pass

    def __init__(self, config, pg_collection=None):
        super().__init__(config, pg_collection)
        device = self.expert_bias.device
        counts = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=device)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("balance_loss", torch.zeros([], device=device), persistent=False)
        self.balance_weight = 0.0

    def gating(self, input):
        """[s, b, h] -> float32 logits [s, b, E]."""
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits, padding_mask=None):
        """Float32 logits [s, b, E] -> weights [T, K] and the `ops.Routing` they are part of.

        Args:
            padding_mask: the sequence of each row, see `MoELayer.forward`.
        """
        c = self.config
        routing = ops.route(
            logits.flatten(0, -2),
            self.expert_bias,
            num_groups=c.moe_router_num_groups,
            topk_groups=c.moe_router_group_topk,
            topk=c.moe_router_topk,
            scale=c.moe_router_topk_scaling_factor,
        )
        if self.tape is not None:
            scale = c.moe_router_topk_scaling_factor
            routing = self.tape(logits.flatten(0, -2), routing, scale)
        weights = routing.weights
        if torch.is_grad_enabled():  # with recomputation on, the second forward only
            ids = self._own_rows(padding_mask)
            self.counts += count(routing.indices, ids >= 0, c.num_moe_experts)
            if self.balance_weight:
                loss = self.balance_weight * balance.sequence_loss(
                    logits.flatten(0, -2),
                    ids,
                    sequences=int(padding_mask.max()) + 1,
                    topk=c.moe_router_topk,
                    group=self.tp_group,
                )
                self.balance_loss += loss.detach()
                weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, routing

    def _own_rows(self, sequence_ids):
        """int64 [b, s of all ranks] -> [T], the sequence of each row of this rank."""
        rows = sequence_ids.T.flatten()
        return rows.chunk(self.tp_group.size())[self.tp_group.rank()]


def count(indices: torch.Tensor, real: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int64 [E], how many of the `real` rows (bool [T]) chose each expert (int64 [T, K])."""
    weights = real.long().repeat_interleave(indices.shape[1])
    return indices.new_zeros(num_experts).scatter_add_(0, indices.flatten(), weights)


class GroupedLinear(torch.nn.Module):
    """One weight [out, in] per local expert, applied to that expert's run of rows.

    Keeps Transformer Engine's parameter names (`weight0`, `weight1`, ...), which Megatron's
    `TEGroupedMLP` and its checkpoints expect.  Experts are whole on a rank (expert tensor
    parallelism 1).
    """

    def __init__(
        self, num_gemms, input_size, output_size, *, config, init_method, pg_collection, **_
    ):
        super().__init__()
        assert pg_collection.expt_tp.size() == 1, "experts are not sharded by tensor parallelism"
        self.num_gemms, self.pg_collection = num_gemms, pg_collection
        for i in range(num_gemms):
            weight = torch.nn.Parameter(
                torch.empty(output_size, input_size, dtype=config.params_dtype)
            )
            if config.perform_initialization:
                init_method(weight.data)
            # Experts count as expert-parallel at any EP size: with EP 1 and TP > 1 every rank sees
            # its own share of the tokens, and Megatron would otherwise never sum their gradients.
            weight.allreduce = False
            # Without this mark the gradient norm counts the experts of TP rank 0 only.
            weight.tensor_model_parallel = True
            self.register_parameter(f"weight{i}", weight)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """[out, in] of each local expert."""
        return [getattr(self, f"weight{i}") for i in range(self.num_gemms)]

    def forward(self, x, rows_per_expert):
        """x [rows, in] sorted by expert, rows_per_expert list[int] -> [rows, out], no bias."""
        runs = x.split(list(rows_per_expert))
        outs = [F.linear(run, weight) for run, weight in zip(runs, self.weights, strict=True)]
        return torch.cat(outs), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Checkpoint entries, one global tensor over all experts for each layer."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        ep = self.pg_collection.ep
        entries = {}
        for i in range(self.num_gemms):
            expert = (len(sharded_offsets), ep.rank() * self.num_gemms + i)
            made = make_sharded_tensors_for_checkpoint(
                {f"{i}.weight": getattr(self, f"weight{i}")},
                "",
                {},
                (*sharded_offsets, (*expert, ep.size() * self.num_gemms)),
                tp_group=self.pg_collection.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(made, f"{i}.", prefix)
            tensor = made[f"{i}.weight"]
            tensor.replica_id = (*tensor.replica_id[:2], self.pg_collection.expt_dp.rank())
            entries[f"{prefix}weight{i}"] = tensor
        return entries
