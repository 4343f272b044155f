"""DeepSeek-V3 as a Megatron-core `GPTModel`: the layer specs and the head."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from r1kern.model import transformer_engine
from r1kern.model.attention import (
    DuplicatedLinear,
    LatentNorm,
    MLASelfAttention,
    RMSNorm,
)
from r1kern.model.core_attention import CoreAttention, Packing
from r1kern.model.dense import DenseConfig, dense_layer_spec, scale_rope
from r1kern.model.fp8 import Precision
from r1kern.model.fp8_layers import replaced
from r1kern.model.moe import GroupedLinear, MoELayer, Router
from r1kern.model.mtp import deeper, mtp_spec
from r1kern.model.scalar_head import ScalarHead
from r1kern.model.substitute import substitute


class DeepSeekV3(GPTModel):
    """A pipeline stage of the model.

    `forward(tokens, positions, None, packed_seq_params=packing)` takes int64 [b, s] (packed:
    [1, T]) and ends at the last hidden states [s * b, H], row s * b + b', all rows on every
    tensor-parallel rank; earlier stages return what the next one takes.  Log-probabilities and
    losses come from the ops of `ops.head` on them and `head_weight`: logits never exist whole.

    With a scalar head it ends at the values of all rows instead, float32 [s * b].

    With multi-token prediction and gradients enabled the states of every depth follow those of the
    model: [(1 + depths) * s * b, H] (see `mtp.mtp_loss`).
    """

    @property
    def head_weight(self) -> torch.Tensor:
        """[V / tp, H], this rank's rows of the language-model head (last stage only)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def has_scalar_head(self) -> bool:
        """On the last stage, which alone has a head."""
        return self.post_process and isinstance(self.output_layer, ScalarHead)

    def _preprocess(self, *, input_ids, packed_seq_params=None, **kwargs):
        # Megatron hands its padding mask to every layer: the place for each row's sequence.
        *rest, _ = super()._preprocess(
            input_ids=input_ids,
            packed_seq_params=packed_seq_params,
            **{**kwargs, "padding_mask": None},
        )
        return (*rest, _sequence_ids(input_ids, packed_seq_params))

    def _postprocess(self, hidden_states, input_ids, packed_seq_params=None, **_):
        if not self.post_process:
            return hidden_states
        if self.has_scalar_head:
            return self.output_layer(hidden_states)
        states = [hidden_states]
        if self.mtp_process and torch.is_grad_enabled():
            states += self._predict_deeper(hidden_states, input_ids, packed_seq_params)
        rows = [self._whole(state) for state in states]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _predict_deeper(self, hidden, input_ids, packing) -> list[torch.Tensor]:
        """The states [s, b, H] of every multi-token-prediction depth."""
        states, sequence_ids = [], _sequence_ids(input_ids, packing)
        for depth, layer in enumerate(self.mtp.layers, 1):
            tokens, ids = deeper(input_ids, sequence_ids, depth)
            hidden = layer(hidden, self.embedding(tokens, None), ids, packing)
            states.append(hidden)
        return states

    def _whole(self, hidden_states):
        """[s, b, H] -> [s * b, H], all rows on every tensor-parallel rank."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=group
            )
        else:
            whole = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        return whole.flatten(0, 1)


def _sequence_ids(input_ids: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """int64 [b, s], the sequence of each token, -1 on padding."""
    if packing is not None:
        return packing.sequence_ids[None]
    return torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)


def build_model(
    config: MLATransformerConfig | DenseConfig,
    *,
    vocab_size: int,
    max_positions: int,
    with_transformer_engine: bool = False,
    scalar_head: bool = False,
    fp8: Precision | None = None,
) -> DeepSeekV3:
    """This rank's pipeline stage, initialised from torch's random state.

    Args:
        config: from `megatron_config.to_megatron_config`.
        vocab_size: rows of the embedding and of the head; must divide by the TP size.
        max_positions: longest sequence.
        with_transformer_engine: take its attention, norms and linears.
        scalar_head: end in one value a token; for a configuration without tied embeddings and
            multi-token prediction (`hf.scalar_head.with_scalar_head`).
        fp8: compute the routed experts, and more of the layers, in blockwise FP8.

    Raises:
        UserError: Transformer Engine is asked for and absent.
    """
    config.fp8_blockwise = fp8  # the FP8 layers read it
    spec, mtp = _block_spec(config, replaced(fp8)), _mtp_spec(config, replaced(fp8))
    if with_transformer_engine:
        transformer_engine.check()
        wrappers = transformer_engine.wrappers()
        spec, mtp = (substitute(part, wrappers) for part in (spec, mtp))
    dense = isinstance(config, DenseConfig)
    model = DeepSeekV3(
        config,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=max_positions,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=dense and config.tied_embeddings,
        mtp_block_spec=mtp,
    )
    if scalar_head and model.post_process:
        model.output_layer = ScalarHead(config, model.pg_collection.tp)
    if dense:
        scale_rope(model.rotary_pos_emb, config)
    return model.cuda() if torch.cuda.is_available() else model


def _block_spec(
    config: MLATransformerConfig | DenseConfig, classes: dict[type, type]
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, with `classes` replaced."""
    first = get_transformer_layer_offset(config)
    layers = [
        dense_layer_spec()
        if isinstance(config, DenseConfig)
        else _layer_spec(moe=bool(config.moe_layer_freq[first + i]))
        for i in range(get_num_layers_to_build(config))
    ]
    return TransformerBlockSubmodules(layer_specs=substitute(layers, classes), layer_norm=RMSNorm)


def _mtp_spec(
    config: MLATransformerConfig | DenseConfig, classes: dict[type, type]
) -> ModuleSpec | None:
    """The multi-token-prediction layers, MoE layers all of them, where this stage has them.

    `classes` are replaced in the layers, not in the projection before them.
    """
    if not config.mtp_num_layers or not mpu.is_pipeline_last_stage():
        return None
    layer = substitute(_layer_spec(moe=True), classes)
    return mtp_spec(layer, RMSNorm, config.mtp_num_layers)


def _layer_spec(*, moe: bool) -> ModuleSpec:
    attention = ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=DuplicatedLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=DuplicatedLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=LatentNorm,
            kv_layernorm=LatentNorm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_moe_spec() if moe else ModuleSpec(module=MLP, submodules=_mlp_submodules()),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_submodules() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _moe_spec() -> ModuleSpec:
    experts = ModuleSpec(
        module=TEGroupedMLP,
        submodules=MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear),
    )
    shared = ModuleSpec(module=SharedExpertMLP, submodules=_mlp_submodules())
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(router=Router, experts=experts, shared_experts=shared),
    )
