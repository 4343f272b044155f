"""Transformer Engine in place of our norms, linears and attention, through the layer specs.

The specs of `model.gpt` name our classes; `build_model` names Transformer Engine's in their stead,
by Megatron-core's own wrappers.  Router, experts, dispatcher and head stay ours.  Every parameter
keeps its name: the wrappers that fuse a norm into the next linear would rename it and are not used.
"""

from __future__ import annotations

from importlib import metadata

import torch
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from packaging.specifiers import SpecifierSet

from r1kern.errors import UserError
from r1kern.model.attention import DuplicatedLinear, LatentNorm, RMSNorm
from r1kern.model.core_attention import CoreAttention

VERSIONS = ">=2.9,<2.12"  # those that megatron-core 0.16.1 is made for

# Our class and the name of Megatron's wrapper.  MLA sees to it that TELinear is whole on every
# tensor-parallel rank ("duplicated") and its gradient summed, as `DuplicatedLinear`'s is.
WRAPPERS = {
    RMSNorm: "TENorm",
    DuplicatedLinear: "TELinear",
    ColumnParallelLinear: "TEColumnParallelLinear",
    RowParallelLinear: "TERowParallelLinear",
    CoreAttention: "TEDotProductAttention",
}


class TELatentNorm:
    """`LatentNorm` by Transformer Engine: Hugging Face fixes its epsilon at 1e-6."""

    def __new__(cls, config, hidden_size: int, eps: float):
        return megatron_te.TENorm(config, hidden_size, eps=1e-6)


def check() -> None:
    """Refuse `model.transformer_engine` where it cannot work.

    Raises:
        UserError: not installed, of another version, broken, or no GPU.
        RuntimeError: Megatron-core's wrappers have changed.
    """
    remedy = "or set model.transformer_engine=false"
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        raise UserError(
            f"model.transformer_engine: Transformer Engine is not installed: "
            f"pip install 'r1kern[te]', {remedy}"
        ) from None
    if not SpecifierSet(VERSIONS).contains(version, prereleases=True):
        raise UserError(
            f"model.transformer_engine: transformer-engine {version} is installed, {VERSIONS} is "
            f"required: pip install 'r1kern[te]', {remedy}"
        )
    if not torch.cuda.is_available():
        raise UserError(
            f"model.transformer_engine needs a CUDA GPU and torch sees none: see `r1kern doctor`, "
            f"{remedy}"
        )
    if not megatron_te.HAVE_TE:
        raise UserError(
            f"model.transformer_engine: transformer-engine {version} does not import beside torch "
            f"{torch.__version__}: build it anew (pip install --no-build-isolation "
            f"--force-reinstall --no-deps transformer-engine-torch), {remedy}"
        )
    missing = [name for name in WRAPPERS.values() if not hasattr(megatron_te, name)]
    if missing:
        raise RuntimeError(
            f"megatron.core.extensions.transformer_engine has no {', '.join(missing)}: "
            f"r1kern/model/transformer_engine.py must be brought up to date"
        )


def wrappers() -> dict[type, type]:
    """Our classes and what stands in for them."""
    return {ours: getattr(megatron_te, name) for ours, name in WRAPPERS.items()} | {
        LatentNorm: TELatentNorm
    }
