"""What every op asks of its arguments; a mistake is a `UserError` of one line."""

from __future__ import annotations

from torch import Tensor

from r1kern.errors import UserError


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def one_device(**tensors: Tensor | None) -> None:
    devices = {name: str(x.device) for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise UserError(f"tensors must be on one device, got {devices}")


def describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


def objective(
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str,
    normalizer: str,
    max_tokens: int | None,
    ref_logp: Tensor | None,
) -> None:
    """The options that all forms of the GRPO loss share."""
    one_of("normalizer", normalizer, ("sequence", "token", "constant"))
    one_of("kl", kl, ("k3", "k3_unbiased", "k2"))
    if ref_logp is None and beta != 0:
        raise UserError(f"ref_logp is missing: give it, or set beta = 0 (beta is {beta})")
    if max_tokens is None and normalizer == "constant":
        raise UserError('normalizer "constant" needs max_tokens, the completion token budget')
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise UserError(
            f"clip_low must be in [0, 1] and clip_high 0 or more, got {clip_low} and {clip_high}"
        )


def head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """hidden [T, H], weight [V, H], int64 targets [T], a positive temperature."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise UserError(f"hidden must be a float tensor [T, H], got {describe(hidden)}")
    T, H = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != H or weight.dtype != hidden.dtype:
        raise UserError(f"weight must be {hidden.dtype} [V, {H}], got {describe(weight)}")
    if targets.shape != (T,) or str(targets.dtype) != "torch.int64":
        raise UserError(f"targets must be torch.int64 [{T}], got {describe(targets)}")
    one_device(hidden=hidden, weight=weight, targets=targets)
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}")
