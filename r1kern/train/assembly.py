"""One rank's stage of a model as the options want it, weights included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from r1kern.config import Experts, Model, Parallel, RecomputedPart
from r1kern.distributed import World
from r1kern.errors import UserError
from r1kern.hf.config import check_layout, check_mtp, read_hf_config
from r1kern.hf.dense import refuse_moe_options
from r1kern.hf.flops import attention_head_dim
from r1kern.hf.fp8_fit import refuse_fp8
from r1kern.hf.layout import stage_layers
from r1kern.hf.reader import HFReader
from r1kern.hf.scalar_head import has_scalar_head, with_scalar_head
from r1kern.model.attention_kernel import Facts, choose_kernel
from r1kern.model.fp8 import Precision
from r1kern.model.gpt import DeepSeekV3, build_model
from r1kern.model.import_hf import import_weights
from r1kern.model.megatron_config import DTYPES, to_megatron_config
from r1kern.model.recompute import recompute_fields


@dataclass(frozen=True)
class Assembly:
    """A model that was built.

    Attributes:
        source: configuration of the folder that it came from.
        hf: its own: another one when its head is not the folder's.
        layers: of each pipeline stage.
        config: Megatron's.
        model: the local stage.
    """

    source: PretrainedConfig
    hf: PretrainedConfig
    layers: list[int]
    config: TransformerConfig
    model: DeepSeekV3


def assemble(
    model: Model,
    parallel: Parallel,
    world: World,
    *,
    experts: Experts = Experts(),  # noqa: B008  (frozen)
    recompute: Sequence[RecomputedPart] = (),
    scalar_head: bool = False,
) -> Assembly:
    """Build this rank's stage and read its weights.

    Args:
        experts: their options, which a dense model cannot have.
        scalar_head: one value a token in place of the language-model head.  A folder that ends in
            one gives it; of a language model's folder all but the head is taken, and the scalar
            head is 0.

    Raises:
        UserError: the model cannot be laid out so (all reasons at once) or read, or has another
            head than is wanted.
    """
    source = hf = read_hf_config(model.path)
    check_layout(hf, parallel, world.size)
    refuse_moe_options(hf, model, experts)
    refuse_fp8(hf, model, parallel, recompute=recompute, device=world.device.type)
    if scalar_head:
        if model.mtp_coef:
            raise UserError(
                "model.mtp_coef: a model with a scalar head predicts no tokens: set it to 0"
            )
        hf = with_scalar_head(source)
    elif has_scalar_head(source):
        raise UserError(
            f"{model.path} is a reward or value model ({source.architectures[0]}) and has no "
            f"language-model head: give the folder of a language model"
        )
    check_mtp(hf, model)
    layers = stage_layers(hf.num_hidden_layers, parallel)
    config = to_megatron_config(
        hf,
        tp=parallel.tp,
        ep=parallel.ep,
        pp=parallel.pp,
        dtype=DTYPES[model.dtype],
        layers=layers,
        mtp=model.mtp_coef > 0,
        **recompute_fields(list(recompute)),
        # Gradients are sums already: nothing may divide them by a count of tokens.
        finalize_model_grads_func=lambda chunks, num_tokens=None, **groups: finalize_model_grads(
            chunks, None, **groups
        ),
    )
    config.attention_kernel = choose_kernel(
        model.attention,
        Facts.here(),
        dtype=config.params_dtype,
        head_dim=attention_head_dim(hf),
    )
    built = build_model(
        config,
        vocab_size=hf.vocab_size,
        max_positions=model.max_positions,
        with_transformer_engine=model.transformer_engine,
        scalar_head=scalar_head,
        fp8=Precision.of(model),
    )
    if model.init == "load":
        import_weights(built, HFReader(model.path, source))
    return Assembly(source, hf, layers, config, built)
