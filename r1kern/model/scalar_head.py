"""One value a token, in place of the language-model head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule


class ScalarHead(MegatronModule):
    """`score.weight` [1, H], whole on every tensor-parallel rank, 0 at first.

    Each rank takes its own rows of a sequence-parallel layer and the values are gathered, not the
    hidden states: their gradient comes back cut by rows, and that of the weight, a sum over this
    rank's rows only, is summed over the ranks by Megatron as for a norm.

    Args:
        config: of the model.
        tp_group: its tensor-parallel group.
    """

    def __init__(self, config, tp_group):
        super().__init__(config)
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=config.params_dtype)
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, b, H] -> float32 [S * b], the values of all ranks' rows on every rank."""
        values = F.linear(hidden.float(), self.weight.float())
        if self.config.sequence_parallel:
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values.flatten()
