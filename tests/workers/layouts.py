"""Worker: parity with transformers and one training trajectory for each of several layouts.

    torchrun layouts.py MODEL_FOLDER REFERENCE.pt OUT TP,EP,PP,BUDGET ... [-- ANOTHER_FOLDER ...]

Writes OUT/{tp}_{ep}_{pp}_{budget}.pt with the logits' and weights' largest differences (dense and
packed), and losses, gradient norms, log-probs and final weights of three updates.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from r1kern import distributed
from r1kern.types import Sequence


def main(model: str, reference: str, out: str, layouts: list[str]) -> None:
    torch.serialization.add_safe_globals([Sequence])
    truth = torch.load(reference)
    for layout in layouts:
        tp, ep, pp, budget = map(int, layout.split(","))
        world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
        result = run(world, model, truth, budget)
        if world.rank == world.size - 1:  # the last pipeline stage holds the logits
            torch.save(result, Path(out) / f"{tp}_{ep}_{pp}_{budget}.pt")
        dist.barrier()


def run(world, model: str, truth: dict, budget: int) -> dict:
    from r1kern.config import Model, Optim, Parallel
    from r1kern.train.packing import pack
    from r1kern.train.policy import Policy

    policy = Policy(
        Model(path=model, dtype="float32"),
        Parallel(tp=world.tp, ep=world.ep, pp=world.pp),
        # A large epsilon keeps Adam from blowing rounding differences of tiny gradients up.
        Optim(lr=1e-2, eps=1e-2),
        world,
        total_updates=10,
    )
    result = {"parity": parity(policy, truth)}
    result["export"] = max(
        (tensor - truth["weights"][name]).abs().max().item() for name, tensor in policy.export()
    )
    batches = pack(
        truth["sequences"],
        budget=budget,
        dp=world.dp,
        dp_rank=world.dp_rank,
        multiple=world.tp,
    )
    result["microbatches"] = len(batches)
    result["logps"] = sum_of(policy.logprobs(batches))
    losses = weighted_nll(truth), fused_grpo(truth), fused_grpo(truth)
    result["updates"] = [policy.update(batches, loss) for loss in losses]
    result["weights"] = {name: tensor.clone() for name, tensor in policy.export()}
    return result


def sum_of(grids: list[torch.Tensor]) -> float:
    """Of all log-probs of the global batch, in float64."""
    from megatron.core import parallel_state as mpu

    total = torch.stack([g.double().sum() for g in grids]).sum()
    dist.all_reduce(total, group=mpu.get_data_parallel_group())
    return total.item()


def weighted_nll(truth: dict):
    """A loss in which every token weighs something else, so that no error cancels."""
    tokens = truth["tokens"]

    def loss(head, batch):
        logps, entropies = head.logprobs()
        weight = 0.5 + (batch.targets % 7) / 7
        value = -(weight * logps).sum() / tokens - 0.1 * entropies.sum() / tokens
        return value, {"entropy": entropies.sum() / tokens, "max_logp": logps.max()}

    return loss


def fused_grpo(truth: dict):
    """The loss of the GRPO loop, advantages by length, with KL and entropy terms."""
    from r1kern import ops

    def loss(head, batch):
        value, metrics = ops.linear_grpo_loss(
            head.hidden,
            head.weight,
            batch.targets,
            None,
            batch.flat(-2 - batch.mask),
            (batch.mask.sum(1) * 7) % 5 + 0.3,
            batch.sequence_ids,
            sampled_logp=batch.flat(0 * batch.mask),
            beta=0.1,
            entropy_coef=0.1,
            num_sequences=len(truth["sequences"]),
            num_tokens=truth["tokens"],
            **head.options,
        )
        return value, {"entropy": metrics["entropy"], "max_logp": metrics["max_mismatch"]}

    return loss


@torch.no_grad()
def parity(policy, truth: dict) -> dict[str, float]:
    """Largest difference of the logits from transformers', dense and packed."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from r1kern.model.core_attention import Packing

    ids = truth["ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    lengths = torch.tensor([0, *(len(d) for d in truth["documents"])])
    packing = Packing.of(lengths.cumsum(0).int())
    inputs = [
        (ids, positions, None),
        (torch.cat(truth["documents"])[None], packing.positions[None], packing),
    ]
    found = []

    def forward_step(iterator, model):
        tokens, places, packed = next(iterator)
        hidden = model(tokens, places, None, packed_seq_params=packed)
        return hidden, lambda h, non_loss_data: found.append(h @ policy.model.head_weight.T) or h

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(inputs),
        model=[policy.ddp],
        num_microbatches=2,
        seq_length=ids.shape[1],
        micro_batch_size=ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    differences = {}
    for name, logits in zip(("dense", "packed"), found, strict=False):
        whole = gather_vocabulary(logits, policy.world.tp)
        differences[name] = (whole - truth[name]).abs().max().item()
    return differences


def gather_vocabulary(logits: torch.Tensor, tp: int) -> torch.Tensor:
    from megatron.core import parallel_state as mpu

    shards = [torch.empty_like(logits) for _ in range(tp)]
    dist.all_gather(shards, logits.contiguous(), group=mpu.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=-1)


if __name__ == "__main__":
    for group in " ".join(sys.argv[1:]).split(" -- "):
        folder, reference, out, *layouts = group.split()
        main(folder, reference, out, layouts)
    distributed.shutdown()
