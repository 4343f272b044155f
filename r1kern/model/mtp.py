"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 section 2.2).

Depth k joins the states of depth k - 1 at token i with the embedding of token i + k, passes them
through one layer of its own and predicts token i + k + 1 by the model's own head.  Embedding and
head are shared with the model, and the gradient flows into the model's states, as in the paper.

Shape legend: s rows of this rank's sequence, b batch (packed: 1), h hidden, T packed tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from r1kern import ops
from r1kern.types import PackedBatch


class MTPLayer(MultiTokenPredictionLayer):
    """Megatron's layer, fed with embeddings that are chosen by `deeper`.

    Megatron shifts packed tokens in a loop over the sequences that waits for the device twice each,
    and its recomputation cannot take packed sequences.
    """

    def forward(self, hidden, embedded, sequence_ids, packing):
        """hidden, embedded [s, b, h], sequence_ids int64 [b, s of all ranks] -> [s, b, h]."""

        def run(hidden, embedded, sequence_ids):
            joined = self._concat_embeddings(hidden, embedded)
            out, _ = self.transformer_layer(
                hidden_states=joined,
                attention_mask=None,
                packed_seq_params=packing,
                padding_mask=sequence_ids,
            )
            return self._postprocess(out)

        if self.config.recompute_granularity == "full" and self.training:
            return tensor_parallel.checkpoint(run, False, hidden, embedded, sequence_ids)
        return run(hidden, embedded, sequence_ids)


def mtp_spec(layer: ModuleSpec, norm: type, depths: int) -> ModuleSpec:
    """The block of `depths` prediction layers around the transformer layer `layer`."""
    parts = MultiTokenPredictionLayerSubmodules(
        enorm=norm,
        hnorm=norm,
        eh_proj=ColumnParallelLinear,
        transformer_layer=layer,
        layer_norm=norm,
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(
            layer_specs=[ModuleSpec(module=MTPLayer, submodules=parts)] * depths
        ),
    )


def deeper(
    tokens: torch.Tensor, sequence_ids: torch.Tensor, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `depth` places on, and the sequences of the rows that have such a token.

    Args:
        tokens, sequence_ids: int64 [b, s]; -1 on padding.

    Returns:
        Tokens, 0 where the sequence has none, and sequence ids, -1 there.
    """
    inside = sequence_ids == sequence_ids.roll(-depth, -1)
    inside[:, tokens.shape[1] - depth :] = False  # roll comes round to the first sequence
    return (
        tokens.roll(-depth, -1).masked_fill(~inside, 0),
        sequence_ids.masked_fill(~inside, -1),
    )


def mtp_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    batch: PackedBatch,
    *,
    depths: int,
    num_tokens: int,
    tp_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Cross-entropy of the completion tokens at every depth (equations 24 and 25, lambda left out).

    Depth k predicts each completion token from the row k before the one that predicts it in the
    model, where the sequence has such a row.  Divided by `num_tokens` and `depths`, as the paper
    divides by the sequence's length whatever the depth; over micro-batches and replicas it adds up.

    Args:
        hidden: [(1 + depths) * T, h] of `DeepSeekV3.forward`.
        weight: [V / tp, h], this rank's rows of the head.
        num_tokens: completion tokens of the global batch.
        tp_group: the ranks that share the vocabulary.
    """
    total = hidden.new_zeros([], dtype=torch.float32)
    for depth in range(1, depths + 1):
        usable = batch.positions[batch.rows] >= depth
        rows = batch.rows[usable] - depth + depth * len(batch.tokens)
        logps, _ = ops.linear_logprob(
            hidden.index_select(0, rows), weight, batch.targets[usable], tp_group=tp_group
        )
        total = total - logps.sum()
    return total / (num_tokens * depths)
