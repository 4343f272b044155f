"""Worker: multi-token prediction under several layouts.

    torchrun mtp.py MODEL_FOLDER TRUTH.pt OUT TP,EP,PP,BUDGET ...

Writes OUT/{tp}_{ep}_{pp}_{budget}.pt: logits of every depth, whether the export is the import, and
losses, gradient norms and weights of two updates.  The last layout is then run with MTP carried,
not trained, and writes OUT/carried.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from layouts import gather_vocabulary
from safetensors.torch import load_file

from r1kern import distributed
from r1kern.types import Sequence


def main(model: str, truth: str, out: str, layouts: list[str]) -> None:
    torch.serialization.add_safe_globals([Sequence])
    given = torch.load(truth)
    source = load_file(Path(model) / "model.safetensors")
    for layout in layouts:
        tp, ep, pp, budget = map(int, layout.split(","))
        world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
        policy = build(world, model, mtp_coef=0.3)
        result = {"export": [n for n, t in policy.export_whole() if not t.equal(source[n])]}
        result["exported"] = [name for name, _ in policy.export_whole()]
        result["sent"] = [name for name, _ in policy.export()]
        result["logits"] = logits(policy, given["documents"])
        result["updates"] = update(policy, given, budget)
        result["weights"] = {n: t.clone() for n, t in policy.export_whole()}
        if world.rank == world.size - 1:
            torch.save(result, Path(out) / f"{tp}_{ep}_{pp}_{budget}.pt")
        dist.barrier()
    policy = build(world, model, mtp_coef=0.0)
    held = [name for name, _ in policy.model.named_parameters() if name.startswith("mtp.")]
    assert not held, held
    update(policy, given, budget)
    policy.save_hf(Path(out) / "carried")
    distributed.shutdown()


def build(world, model: str, mtp_coef: float):
    from r1kern.config import Model, Optim, Parallel
    from r1kern.train.policy import Policy

    return Policy(
        Model(path=model, dtype="float32", mtp_coef=mtp_coef),
        Parallel(tp=world.tp, ep=world.ep, pp=world.pp),
        Optim(lr=1e-2, eps=1e-2, clip_grad=0.0),
        world,
        total_updates=10,
    )


def update(policy, given: dict, budget: int) -> list[dict]:
    from functools import partial

    from r1kern.train.packing import pack
    from r1kern.train.sft import sft_loss

    world = policy.world
    batches = pack(
        given["sequences"],
        budget=budget,
        dp=world.dp,
        dp_rank=world.dp_rank,
        multiple=world.tp,
    )
    loss = partial(sft_loss, num_tokens=given["tokens"])
    return [policy.update(batches, loss) for _ in range(2)]


def logits(policy, documents: list[torch.Tensor]) -> torch.Tensor | None:
    """[1 + depths, T, V] of packed documents, on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from r1kern.model.core_attention import Packing

    lengths = torch.tensor([0, *(len(d) for d in documents)])
    packing = Packing.of(lengths.cumsum(0).int())
    tokens = torch.cat(documents)[None]
    found = []

    def forward_step(iterator, model):
        next(iterator)
        hidden = model(tokens, packing.positions[None], None, packed_seq_params=packing)

        def keep(hidden):
            found.append((hidden @ policy.model.head_weight.T).detach())
            return hidden.sum() * 0, torch.zeros([], dtype=torch.int), {}

        return hidden, keep

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([0]),
        model=[policy.ddp],
        num_microbatches=1,
        seq_length=tokens.numel(),
        micro_batch_size=1,
        forward_only=False,
    )
    if not found:
        return None
    return gather_vocabulary(found[0], policy.world.tp).view(-1, tokens.numel(), 96)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
