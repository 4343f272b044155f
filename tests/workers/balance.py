"""Worker: two updates with expert bias, balance loss and MTP under layouts and recomputations.

    torchrun balance.py MODEL_FOLDER TRUTH.pt OUT TP,EP,PP,BUDGET,PARTS ...

PARTS are the recomputed parts, joined by `+`, or `-`.  Writes for each layout OUT/LAYOUT.pt (commas
become _) with metrics, biases after each update, final weights, this rank's expert counts of each
update, and the bytes that the first forward saved for its backward.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from r1kern import distributed
from r1kern.types import Sequence

BIAS_RATE, BALANCE = 0.05, 0.5


def main(model: str, truth: str, out: str, layouts: list[str]) -> None:
    torch.serialization.add_safe_globals([Sequence])
    given = torch.load(truth)
    for layout in layouts:
        *sizes, parts = layout.split(",")
        tp, ep, pp, budget = map(int, sizes)
        world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
        result = run(world, model, given, budget, [] if parts == "-" else parts.split("+"))
        if world.rank == world.size - 1:
            torch.save(result, Path(out) / f"{layout.replace(',', '_')}.pt")
        dist.barrier()
    distributed.shutdown()


def run(world, model: str, given: dict, budget: int, recompute: list[str]) -> dict:
    from r1kern.config import Experts, Model, Optim, Parallel
    from r1kern.model import balance
    from r1kern.model.moe import Router
    from r1kern.train import policy as policy_module
    from r1kern.train.packing import pack
    from r1kern.train.sft import sft_loss

    policy = policy_module.Policy(
        Model(path=model, dtype="float32", mtp_coef=given["mtp_coef"]),
        Parallel(tp=world.tp, ep=world.ep, pp=world.pp),
        Optim(lr=1e-2, eps=1e-2, clip_grad=0.0),
        world,
        total_updates=10,
        experts=Experts(bias_update_rate=BIAS_RATE, balance_coef=BALANCE),
        recompute=recompute,
    )
    batches = pack(
        given["sequences"],
        budget=budget,
        dp=world.dp,
        dp_rank=world.dp_rank,
        multiple=4,  # padding rows, which must not count
    )
    policy.logprobs(batches[:1] * 3)  # nor must this pass
    storages, held, counts = {}, [], []

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
        return tensor

    def finish_update(model, rate, original=balance.finish_update):
        routers = [m for m in model.modules() if isinstance(m, Router)]
        counts.append([r.counts.clone() for r in routers])
        return original(model, rate)

    def loss(head, batch):
        result = sft_loss(head, batch, num_tokens=given["tokens"])
        held.append(sum({s.data_ptr(): s.nbytes() for s in storages.values()}.values()))
        return result

    policy_module.balance = SimpleNamespace(
        start_update=balance.start_update, finish_update=finish_update
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        updates = [policy.update(batches[:], loss)]
    storages.clear()
    biases = [biases_of(policy)]
    updates.append(policy.update(batches, loss))
    return {
        "updates": updates,
        "biases": [*biases, biases_of(policy)],
        "weights": {n: t.clone() for n, t in policy.export_whole()},
        "saved_bytes": held[0] if held else None,  # the last stage makes the loss
        "counts": torch.stack([torch.stack(c) for c in counts]),
    }


def biases_of(policy) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in policy.export_whole() if n.endswith("e_score_correction_bias")}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
