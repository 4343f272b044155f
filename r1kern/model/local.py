"""This rank's weights and the Hugging Face tensors they are cuts of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from r1kern.hf.names import EXPERT, LAYER, MTP, OUTSIDE, SCALAR_HEAD, Slot
from r1kern.model.gpt import DeepSeekV3


def local_tensors(model: DeepSeekV3) -> Iterator[tuple[str, torch.Tensor, Slot]]:
    """Every weight of this rank: Megatron name, tensor (views of the parameters), slot."""
    first_layer = get_transformer_layer_offset(model.config)
    experts = (model.config.num_moe_experts or 0) // mpu.get_expert_model_parallel_world_size()
    first_expert = mpu.get_expert_model_parallel_rank() * experts
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("_extra_state"):
            continue  # Megatron's (None) and Transformer Engine's (bytes as a tensor)
        if name == "output_layer.weight" and model.has_scalar_head:
            yield name, tensor.data, SCALAR_HEAD
            continue
        if name in OUTSIDE:
            # The last pipeline stage holds a copy of an embedding that is the head too.
            tied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
            held = "embedding.word_embeddings.weight" if tied else name
            yield name, tensor.data, OUTSIDE[held]
            continue
        block, _, index, rest = name.split(".", 3)  # decoder.layers.0.… or mtp.layers.0.…
        first = model.config.num_layers if block == "mtp" else first_layer
        layer = f"model.layers.{int(index) + first}."
        rest = rest.removeprefix("transformer_layer.")
        stem = rest.rstrip("0123456789")
        if stem in EXPERT:
            expert = first_expert + int(rest[len(stem) :])
            names = tuple(f"{layer}mlp.experts.{expert}.{n}" for n in EXPERT[stem])
            yield name, tensor.data, Slot(names, None)
        else:
            names, split = (LAYER | MTP)[rest]
            yield name, tensor.data, Slot(tuple(layer + n for n in names), split)
