"""Even load of the experts: the bias update and the sequence-level loss of DeepSeek-V3.

Shape legend: T tokens of this rank, E experts, K experts per token, B sequences, L MoE layers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu


def sequence_loss(
    logits: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    sequences: int,
    topk: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """This rank's share of the sequences' balance losses (arXiv 2412.19437, equations 17-20).

    sum_i f_i P_i of each sequence, alpha left out, summed over the sequences: f_i = E / (K T) times
    the number of its T tokens whose K greatest scores include s_i, P_i the mean of s_i / sum_j s_j.
    As the paper writes it f counts the K greatest scores themselves, not the routed choice with its
    bias and groups.  f has no gradient; the sum of the ranks' shares is the loss.

    Args:
        logits: floating [T, E], this rank's part of the tokens.
        sequence_ids: int64 [T], -1 on padding.
        sequences: B.
        topk: K.
        group: the ranks that hold parts of the same sequences.
    """
    scores = logits.sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    place = torch.where(sequence_ids < 0, sequences, sequence_ids)  # padding has a row of its own
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(topk).indices, 1.0)
    counts = scores.new_zeros(sequences + 1, scores.shape[1]).index_add_(0, place, chosen.detach())
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    lengths = counts.sum(1, keepdim=True) / topk
    factors = counts * (scores.shape[1] / topk) / lengths.clamp(min=1) ** 2
    factors[sequences] = 0
    return (factors[place] * shares).sum()


def start_update(model: torch.nn.Module, weight: float) -> None:
    """Set the weight of each sequence's balance loss, in every MoE layer.

    Args:
        weight: alpha over the sequences of the global batch, so that the loss is their mean, summed
            over layers, however the batch is cut.
    """
    for router in _routers(model):
        router.balance_weight = weight


@torch.no_grad()
def finish_update(model: torch.nn.Module, rate: float) -> dict[str, float]:
    """Auxiliary-loss-free balance (arXiv 2412.19437 section 2.1.2; arXiv 2408.15664, algorithm 1).

    b_i += rate * sign(mean count - count_i), exactly, from the tokens that chose each expert since
    the last call, of all micro-batches and ranks; then counts from 0 again.  Collective.

    Returns:
        "expert_load", the greatest load of an expert of any layer over its layer's mean, and
        "balance_loss", summed over layers and weighted, if it is on; nothing for a dense model.
    """
    if not model.config.num_moe_experts:
        return {}
    routers = _routers(model)
    largest = loss = 0.0
    if routers:  # alike on every rank of the group: it spans one pipeline stage
        group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
        counts = torch.stack([router.counts for router in routers])  # [L, E]
        losses = torch.stack([router.balance_loss for router in routers])
        dist.all_reduce(counts, group=group)
        dist.all_reduce(losses, group=group)
        totals, experts = counts.sum(1, keepdim=True), counts.shape[1]
        for router, change in zip(routers, torch.sign(totals - counts * experts), strict=True):
            router.expert_bias += rate * change
            router.counts.zero_()
            router.balance_loss.zero_()
        largest = (counts * experts / totals.clamp(min=1)).max().item()
        loss = losses.sum().item()
    stages: list = [None] * mpu.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, (largest, loss), mpu.get_pipeline_model_parallel_group())
    metrics = {"expert_load": max(s[0] for s in stages), "balance_loss": sum(s[1] for s in stages)}
    return metrics if metrics["balance_loss"] else {"expert_load": metrics["expert_load"]}


def _routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "balance_weight")]
