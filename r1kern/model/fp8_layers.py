"""Routed experts and linears in blockwise FP8, in place of the model's own through its specs.

Parameters, names, checkpoints and collectives are those of the classes replaced.
"""

from __future__ import annotations

import megatron.core.transformer.multi_latent_attention as megatron_mla
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.moe.experts import TEGroupedMLP

from r1kern import ops
from r1kern.model.attention import DuplicatedLinear
from r1kern.model.dense import QKVLinear
from r1kern.model.fp8 import Precision, Weights, main_grads


class FP8Experts(TEGroupedMLP):
    """fc1, SwiGLU and fc2 of all local experts by `ops.fp8_experts`."""

    def __init__(self, num_local_experts, config, submodules, pg_collection=None):
        super().__init__(num_local_experts, config, submodules, pg_collection)
        self.fp8_fc1 = Weights(config.fp8_blockwise, parts=2)
        self.fp8_fc2 = Weights(config.fp8_blockwise)

    def forward(self, rows, rows_per_expert, probs):
        """rows [R, H] by expert, int64 [E] on the host, float32 [R] -> [R, H] and no bias."""
        ends = rows_per_expert.cumsum(0)
        offsets = F.pad(ends, (1, 0)).to(rows.device, non_blocking=True)
        fc1, fc2 = self.linear_fc1.weights, self.linear_fc2.weights
        out = ops.fp8_experts(
            rows,
            probs,
            offsets,
            fc1,
            fc2,
            self.fp8_fc1.of(fc1, fc1[0].requires_grad),
            self.fp8_fc2.of(fc2, fc2[0].requires_grad),
            power_of_two=self.config.fp8_blockwise.power_of_two,
            grads=main_grads([*fc1, *fc2]),
        )
        self.fp8_fc1.count(fc1, rows, out)
        self.fp8_fc2.count(fc2)
        return out, None


class FP8ColumnParallelLinear(ColumnParallelLinear):
    """The rows of a weight over the tensor-parallel ranks.

    For the backward the gathered rows are kept in FP8, where Megatron keeps this rank's rows and
    gathers them again.
    """

    def __init__(self, *args, config, stride=1, **kwargs):
        super().__init__(*args, config=config, stride=stride, **kwargs)
        self.fp8 = Weights(config.fp8_blockwise, parts=stride)  # Megatron's word for gate and up

    def _forward_impl(
        self, input, weight, bias, *, allreduce_dgrad, sequence_parallel, tp_group, **_
    ):
        x = input
        if sequence_parallel:
            x = gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=True, group=tp_group
            )
        elif allreduce_dgrad:
            x = copy_to_tensor_model_parallel_region(x, group=tp_group)
        return self.product(x, weight, bias)

    def product(self, x, weight, bias):
        out = self.fp8.linear(x, weight)
        return out if bias is None else out + bias


class FP8RowParallelLinear(RowParallelLinear):
    """The columns of a weight over the tensor-parallel ranks."""

    def __init__(self, *args, config, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        self.fp8 = Weights(config.fp8_blockwise)

    def _forward_impl(self, input, weight, **_):
        return self.fp8.linear(input, weight)


class FP8DuplicatedLinear(DuplicatedLinear):
    """The whole weight on every tensor-parallel rank, over this rank's rows."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.fp8 = Weights(config.fp8_blockwise)

    def forward(self, x):
        return self.fp8.linear(x, self.weight), None


class FP8QKVLinear(QKVLinear):
    """Three products, for the blocks of query, key and value are apart."""

    part = FP8ColumnParallelLinear

    def forward(self, hidden):
        """[s, b, H] -> q [S, b, n d], k and v [S, b, g d]."""
        x = hidden
        if self.q.sequence_parallel:
            x = gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=True, group=self.tp_group
            )
        elif self.q.allreduce_dgrad:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        return tuple(part.product(x, part.weight, part.bias) for part in (self.q, self.k, self.v))


# MLA takes its down projections from a closed list of classes, of which this name, Transformer
# Engine's, is free: their wrappers and FP8 linears exclude each other.
if not hasattr(megatron_mla, "TEColumnParallelLinear"):
    raise RuntimeError(
        "megatron.core.transformer.multi_latent_attention.TEColumnParallelLinear is gone: "
        "r1kern/model/fp8_layers.py must be brought up to date with the installed megatron-core"
    )
megatron_mla.TEColumnParallelLinear = FP8DuplicatedLinear

LINEARS = {
    ColumnParallelLinear: FP8ColumnParallelLinear,
    RowParallelLinear: FP8RowParallelLinear,
    DuplicatedLinear: FP8DuplicatedLinear,
    QKVLinear: FP8QKVLinear,
}


def replaced(precision: Precision | None) -> dict[type, type]:
    """The model's classes and those that compute in FP8 instead."""
    if precision is None:
        return {}
    return {TEGroupedMLP: FP8Experts} | (LINEARS if precision.linears else {})
