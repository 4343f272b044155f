"""Which kernel computes packed attention: chosen once, by what is installed and what can run it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from r1kern.errors import UserError

# q [T, n, d], k and v [T, g, d] with g a divisor of n, int32 offsets [B + 1], longest sequence,
# softmax scale -> [T, n, d]
Varlen = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor
]

WIDEST = 256  # head dimension of FlashAttention's kernels


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        capability: of the CUDA device, (0, 0) without one.
        varlen: torch's `varlen_attn` takes a scale, and FlashAttention was built into torch.
        flash: flash-attn is installed.
    """

    capability: tuple[int, int]
    varlen: bool
    flash: bool

    @classmethod
    def here(cls) -> Facts:
        """Of this process."""
        cuda = torch.cuda.is_available()
        return cls(
            capability=torch.cuda.get_device_capability() if cuda else (0, 0),
            varlen=_has_varlen() and torch.backends.cuda.is_flash_attention_available(),
            flash=importlib.util.find_spec("flash_attn") is not None,
        )


def _has_varlen() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def choose_kernel(option: str, facts: Facts, *, dtype: torch.dtype, head_dim: int) -> str:
    """`model.attention` made definite: "sdpa", "varlen" (torch's) or "flash" (flash-attn's).

    "auto" is torch's kernel for variable lengths where it can run, and SDPA elsewhere.

    Args:
        option: "auto", "sdpa", "varlen" or "flash".
        facts: see there.
        dtype: of the activations.
        head_dim: of queries and keys (values are padded to it).

    Raises:
        UserError: the kernel that was asked for cannot work here; names every reason.
    """
    if option == "sdpa":
        return option
    kernel = "varlen" if option == "auto" else option
    reasons = []
    if kernel == "varlen" and not facts.varlen:
        reasons.append("this torch has no torch.nn.attention.varlen on FlashAttention")
    if kernel == "flash" and not facts.flash:
        reasons.append("flash-attn is not installed (pip install 'r1kern[flash]')")
    if facts.capability < (8, 0):
        reasons.append("it needs a CUDA device of compute capability 8.0 or more")
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"it needs model.dtype=bfloat16, not {str(dtype).removeprefix('torch.')}")
    if head_dim > WIDEST or head_dim % 8:
        reasons.append(f"heads of {head_dim} are no multiple of 8 up to {WIDEST}")
    if not reasons:
        return kernel
    if option == "auto":
        return "sdpa"
    raise UserError(
        f"model.attention={option} cannot work: {'; '.join(reasons)}; or set model.attention=auto"
    )


def load_kernel(kernel: str) -> Varlen | None:
    """The kernel for variable lengths that `choose_kernel` named; None for SDPA, which is none."""
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 takes groups of heads without being told.
        told = "enable_gqa" in inspect.signature(varlen_attn).parameters

        def attend(q, k, v, cu_seqlens, longest, scale):
            seqlens = cu_seqlens, cu_seqlens, longest, longest
            grouped = {"enable_gqa": True} if told and q.shape[1] != k.shape[1] else {}
            # No key to the right of the query: causal.
            return varlen_attn(q, k, v, *seqlens, scale=scale, window_size=(-1, 0), **grouped)

        return attend
    if kernel == "flash":
        from flash_attn import flash_attn_varlen_func

        def attend(q, k, v, cu_seqlens, longest, scale):
            seqlens = cu_seqlens, cu_seqlens, longest, longest
            return flash_attn_varlen_func(q, k, v, *seqlens, softmax_scale=scale, causal=True)

        return attend
    assert kernel == "sdpa", kernel
    return None
