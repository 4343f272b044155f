"""The public fused ops: plain tensors in, plain tensors out.

`torch.library` dispatches them by device: each custom op (here or in
`r1kern.kernels`) has a kernel in plain torch that
runs anywhere, a fake kernel (FakeTensor, torch.compile, dry runs) and an autograd formula; a faster
kernel of one device is added with `register_kernel`.  `r1kern.kernels.reference` says the same
things naively and is the truth they are tested against.

Every function raises `UserError` (a `ValueError`) of one line for arguments that do not fit.

Shape legend: N completions, B sequences, S longest completion, T tokens, H hidden, V rows of this
rank's vocabulary shard, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from r1kern.errors import UserError
from r1kern.kernels.linear_logprob import linear_logprob as _linear_logprob
from r1kern.kernels.route import route as _route


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        indices: int64 [T, K], experts of each token, best first.
        weights: float [T, K], their mixing weights.
        counts: int64 [E], tokens each expert receives.
    """

    indices: Tensor
    weights: Tensor
    counts: Tensor


def group_advantage(
    rewards: Tensor, group_ids: Tensor, *, std: str = "population", eps: float = 1e-6
) -> Tensor:
    """Group-relative advantage A_i = (r_i - mean(r)) / (std(r) + eps), DeepSeek-R1 equation (3).

    The paper's plain `std` is read as the population's.  A group whose rewards are all equal, a
    single completion included, gets exactly 0.  Computed in float64; no gradient.

    Args:
        rewards: floating [N].
        group_ids: integer [N]; completions with equal ids form a group, in any order and size.
        std: "population" (divide by n), "sample" (by n - 1), or "none": A_i = r_i - mean(r), as in
            Dr. GRPO (arXiv 2503.20783).
        eps: added to the standard deviation, in units of reward.

    Returns:
        Advantages [N] in the dtype of `rewards`.

    Raises:
        UserError: bad shape or dtype, unknown `std`, or a reward that is NaN or infinite (leave a
            completion that could not be graded out of its group).
    """
    _one_of("std", std, ("population", "sample", "none"))
    if not rewards.is_floating_point() or rewards.dim() != 1:
        raise UserError(f"rewards must be a float tensor [N], got {_describe(rewards)}")
    if group_ids.is_floating_point() or group_ids.shape != rewards.shape:
        raise UserError(
            f"group_ids must be integers {list(rewards.shape)}, got {_describe(group_ids)}"
        )
    _one_device(rewards=rewards, group_ids=group_ids)
    return _group_advantage(rewards, group_ids, std, eps)


@torch.library.custom_op("r1kern::group_advantage", mutates_args=())
def _group_advantage(rewards: Tensor, group_ids: Tensor, std: str, eps: float) -> Tensor:
    finite = rewards.isfinite()
    if not finite.all():
        i = int((~finite).nonzero()[0])
        raise UserError(
            f"rewards[{i}] is {rewards[i].item()}: leave completions that could not be graded out"
        )
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    r = rewards.double()
    zeros = r.new_zeros(len(size))
    # Counted from the group's least reward, equal rewards are exact zeros: no rounding of the mean
    # is left for a standard deviation near 0 to blow up.
    r = r - zeros.scatter_reduce(0, group, r, "amin", include_self=False)[group]
    r = r - (zeros.index_add(0, group, r) / size)[group]
    if std != "none":
        degrees = size - int(std == "sample")
        deviation = (zeros.index_add(0, group, r * r) / degrees).sqrt()[group]
        # 0, or NaN for the sample deviation of a single completion: neither is above 0.
        r = torch.where(deviation > 0, r / (deviation + eps), 0)
    return r.to(rewards.dtype)


@_group_advantage.register_fake
def _(rewards: Tensor, group_ids: Tensor, std: str, eps: float) -> Tensor:
    return rewards.new_empty(rewards.shape)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.001,
    normalizer: str = "sequence",
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    ratio: str = "token",
    importance_weights: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss, the value to minimise: -J of DeepSeek-R1 (arXiv 2501.12948), equation (1).

    J = 1/G sum_i 1/|o_i| sum_t [ min(rho_it A_i, clip(rho_it, 1-clip_low, 1+clip_high) A_i)
                                  - beta (pi_ref/pi - log(pi_ref/pi) - 1)_it ],  rho = pi / pi_old

    Where it differs from the paper: equation (1) is written with the probability of the whole
    completion; like the GRPO paper (arXiv 2402.03300, equation 3) this takes the ratio and the KL
    estimate k3 (equation 2) per token and their mean over the completion.  Everything else of the
    default is the paper's: mean over sequences of each one's token mean, symmetric clip.

    An empty completion contributes 0 and counts as a sequence.  What lies under the mask, NaN and
    infinities included, reaches neither the loss nor a gradient.  Only `logp` has a gradient: the
    old and reference policies are constants.

    Args:
        logp, old_logp, ref_logp: [B, S] log-probs of the sampled tokens under the policy, the
            policy before this update, and the reference; `ref_logp` may be None when `beta` is 0.
        advantages: [B].
        mask: [B, S], non-zero on completion tokens.
        clip_low, clip_high: the clip is [1 - clip_low, 1 + clip_high]; a higher `clip_high` is
            DAPO's asymmetric clip (arXiv 2503.14476, equation 10).
        beta: weight of the KL estimate.
        normalizer: "sequence" (the paper): each sequence's token mean, then 1/num_sequences.
            "token": all tokens alike, 1/num_tokens (DAPO, equation 12).  "constant": token sums,
            1/(num_sequences * max_tokens) (Dr. GRPO, arXiv 2503.20783).
        num_sequences, num_tokens: sequences and completion tokens of the whole global batch
            (default: of this call).  Pass them when a batch is cut into micro-batches or spread
            over ranks: losses, gradients and metrics of the pieces then *add up* to the whole's.
        ratio: "token"; "sequence": rho_i = exp(mean_t(log pi - log pi_old)) for every token of the
            sequence (GSPO, arXiv 2507.18071, equation 7); "completion": the whole completion's
            pi(o_i|q) / pi_old(o_i|q), equation (1) to the letter.
        importance_weights: [B, S], constants that multiply the policy term (not the KL), such as
            min(pi_old / pi_generator, C) of truncated importance sampling.
        max_tokens: the constant of "constant": the completion token budget.

    Returns:
        The loss (0-d, float32 at least) and detached 0-d metrics, each a per-token mean over
        `num_tokens` and so additive like the loss: "ratio", "clip_fraction" (the clip is active)
        and its parts "clip_low_fraction" and "clip_high_fraction", and "kl" (k3, where `ref_logp`
        is given).

    Raises:
        UserError: shapes that disagree, an unknown option, a missing `ref_logp` or `max_tokens`.
    """
    _one_of("normalizer", normalizer, ("sequence", "token", "constant"))
    _one_of("ratio", ratio, ("token", "sequence", "completion"))
    _fits(
        logp,
        advantages,
        old_logp=old_logp,
        ref_logp=ref_logp,
        mask=mask,
        importance_weights=importance_weights,
    )
    if ref_logp is None and beta != 0:
        raise UserError(f"ref_logp is missing: give it, or set beta = 0 (beta is {beta})")
    if max_tokens is None and normalizer == "constant":
        raise UserError('normalizer "constant" needs max_tokens, the completion token budget')
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise UserError(
            f"clip_low must be in [0, 1] and clip_high 0 or more, got {clip_low} and {clip_high}"
        )

    live = mask.bool()
    dtype = torch.promote_types(logp.dtype, torch.float32)

    def shown(x: Tensor) -> Tensor:
        return torch.where(live, x.to(dtype), 0)

    lengths = live.sum(1, keepdim=True).clamp(min=1)
    num_sequences = _at_least_one(len(logp) if num_sequences is None else num_sequences)
    num_tokens = _at_least_one(live.sum() if num_tokens is None else num_tokens)
    if normalizer == "sequence":
        share = live.to(dtype) / (lengths * num_sequences)
    elif normalizer == "token":
        share = live.to(dtype) / num_tokens
    else:
        share = live.to(dtype) / (num_sequences * max_tokens)

    logp = shown(logp)
    A = shown(advantages.detach()[:, None])
    log_rho = logp - shown(old_logp.detach())
    if ratio != "token":
        over = lengths if ratio == "sequence" else 1
        log_rho = shown(log_rho.sum(1, keepdim=True) / over)
    rho = log_rho.exp()
    term = torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    if importance_weights is not None:
        term = term * shown(importance_weights.detach())

    low = (A < 0) & (rho < 1 - clip_low)
    high = (A > 0) & (rho > 1 + clip_high)
    counted = {
        "ratio": shown(rho.detach()),
        "clip_fraction": low | high,
        "clip_low_fraction": low,
        "clip_high_fraction": high,
    }
    if ref_logp is not None:
        log_ref = shown(ref_logp.detach()) - logp
        kl = log_ref.expm1() - log_ref
        if beta != 0:
            term = term - beta * kl
        counted["kl"] = kl.detach()
    metrics = {name: value.sum(dtype=dtype) / num_tokens for name, value in counted.items()}
    return -(term * share).sum(), metrics


def _fits(logp: Tensor, advantages: Tensor, **per_token: Tensor | None) -> None:
    """Refuses tensors of `grpo_loss` that disagree."""
    if logp.dim() != 2 or not logp.is_floating_point():
        raise UserError(f"logp must be a float tensor [B, S], got {_describe(logp)}")
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != logp.shape:
            raise UserError(f"{name} must be {list(logp.shape)} like logp, got {_describe(tensor)}")
    if advantages.shape != logp.shape[:1]:
        raise UserError(f"advantages must be [{len(logp)}], got {_describe(advantages)}")
    _one_device(logp=logp, advantages=advantages, **per_token)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of softmax(hidden @ weight.T / temperature).

    The logits are made in chunks of rows (`LOGITS_BYTES`) and made again in the backward.  Matrix
    products run in the inputs' dtype, statistics and accumulation in float32 (float64 for float64).
    Deterministic.

    Over `tp_group` each rank holds the consecutive rows of the vocabulary that follow those of the
    ranks before it; shards may differ in size.  `hidden` and `targets` are the same on every rank,
    and so are the results, bit for bit.  Two collectives in the forward, none in the backward.

    Gradients flow to `hidden` and `weight` from both results.  Over `tp_group`, `weight` receives
    its shard's whole gradient, and `hidden` only this rank's part: the caller sums it over the
    group (as Megatron's `copy_to_tensor_model_parallel_region` does in its backward).

    Args:
        hidden: floating [T, H].
        weight: [V, H], same dtype.
        targets: int64 [T], in the whole vocabulary.
        temperature: positive divisor of the logits.
        tp_group: the ranks that share the vocabulary.

    Returns:
        Log-probs [T] and entropies [T] (nats), float32, or float64 for float64 inputs.

    Raises:
        UserError: bad shape, dtype or device, a target outside the vocabulary, `temperature` not
            above 0, ranks that disagree about T.
    """
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise UserError(f"hidden must be a float tensor [T, H], got {_describe(hidden)}")
    T, H = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != H or weight.dtype != hidden.dtype:
        raise UserError(f"weight must be {hidden.dtype} [V, {H}], got {_describe(weight)}")
    if targets.shape != (T,) or targets.dtype != torch.int64:
        raise UserError(f"targets must be torch.int64 [{T}], got {_describe(targets)}")
    _one_device(hidden=hidden, weight=weight, targets=targets)
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}")
    shared = tp_group is not None and tp_group.size() > 1
    group = tp_group.group_name if shared else None
    logp, entropy, *_ = _linear_logprob(hidden, weight, targets, float(temperature), group)
    return logp, entropy


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    scale: float = 1.0,
    normalize: bool = True,
) -> Routing:
    """DeepSeek-V3's group-limited router (arXiv 2412.19437, equations 12-16 and section 2.1.2).

    Scores are sigmoid(logits).  `score + bias` selects: of the groups of E / num_groups consecutive
    experts the `topk_groups` with the greatest sum of their best two, and among their experts the
    `topk` best.  Of equal candidates the lowest index wins.  The weights are the selected raw
    scores, the bias being no part of them, divided by their sum + 1e-20 (`normalize`), times
    `scale`.  Only `logits` has a gradient, through the weights.

    Args:
        logits: floating [T, E].
        bias: [E].

    Returns:
        `Routing`; weights are float32, or float64 for float64 logits.

    Raises:
        UserError: bad shape, or numbers of groups and experts that cannot be.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UserError(f"logits must be a float tensor [T, E], got {_describe(logits)}")
    E = logits.shape[1]
    if bias.shape != (E,):
        raise UserError(f"bias must be [{E}], got {_describe(bias)}")
    _one_device(logits=logits, bias=bias)
    if num_groups < 1 or E % num_groups:
        raise UserError(f"num_groups must divide the {E} experts, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise UserError(f"topk_groups must be in 1..{num_groups} (num_groups), got {topk_groups}")
    size = E // num_groups
    if size < 2 and topk_groups < num_groups:
        raise UserError(f"num_groups must leave at least 2 of {E} experts a group: {num_groups}")
    if not 1 <= topk <= topk_groups * size:
        raise UserError(f"topk must be in 1..{topk_groups * size}, got {topk}")
    layout = num_groups, topk_groups, topk, float(scale), bool(normalize)
    weights, indices, counts = _route(logits, bias, *layout)
    return Routing(indices, weights, counts)


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _one_device(**tensors: Tensor | None) -> None:
    devices = {name: str(x.device) for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise UserError(f"tensors must be on one device, got {devices}")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"
