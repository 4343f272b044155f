"""Whether a model can be computed in FP8 as its options say; free of Megatron."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PretrainedConfig

from r1kern.config import Model, Parallel, RecomputedPart
from r1kern.errors import UserError
from r1kern.hf.dense import is_dense
from r1kern.hf.fp8_blocks import BLOCK, is_quantised
from r1kern.hf.names import hf_shapes, hf_splits


def refuse_fp8(
    hf: PretrainedConfig,
    model: Model,
    parallel: Parallel,
    *,
    recompute: Sequence[RecomputedPart],
    device: str,
) -> None:
    """Refuse `model.precision = fp8_blockwise` where it cannot work.

    Args:
        device: "cuda", where the kernels want whole blocks, or "cpu".

    Raises:
        UserError: one line with *all* violations.
    """
    if model.precision == "dtype":
        return
    lines = []
    if is_dense(hf) and not model.fp8_linears:
        lines.append(f"{hf.model_type} has no experts (set model.fp8_linears=true)")
    if "moe_act" in recompute and not is_dense(hf):
        lines.append("FP8 experts keep no activation to leave out: take moe_act out of recompute")
    if device == "cuda":
        lines += ragged(hf, model, parallel.tp)
    if lines:
        raise UserError(
            f"model.precision=fp8_blockwise: {'; '.join(lines)}; or set model.precision=dtype"
        )


def ragged(hf: PretrainedConfig, model: Model, tp: int) -> list[str]:
    """The weights, cut for a rank, that a GPU's kernels cannot take: columns, and rows of experts
    or of gate and up, that are no multiple of a block.  Other rows are padded (`model.fp8`)."""
    if model.precision == "dtype":
        return []
    shapes = hf_shapes(hf, mtp=model.mtp_coef > 0)
    splits = hf_splits(shapes)
    found = {}
    for name, shape in shapes.items():
        if not is_quantised(name) or not (model.fp8_linears or ".experts." in name):
            continue
        size = [n // tp if i == splits[name] else n for i, n in enumerate(shape)]
        padded = not re.search(r"\.experts\.|gate_proj|up_proj", name)
        if size[1] % BLOCK or (size[0] % BLOCK and not padded):
            stem = re.sub(r"model\.layers\.\d+\.|(?<=experts)\.\d+|\.weight", "", name)
            found[stem] = f"{stem} is {size[0]} x {size[1]} on a rank"
    if not found:
        return []
    remedy = " (lower parallel.tp, or set model.fp8_linears=false)" if model.fp8_linears else ""
    return [f"{', '.join(found.values())}, no multiple of {BLOCK}{remedy}"]
