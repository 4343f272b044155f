"""Worker: one update of an FP8 model on the same two halves of a batch, under several layouts.

    torchrun fp8_layouts.py MODEL OUT.json TP,EP,PP ...

Data-parallel ranks take one half each, a single one both: as two micro-batches under pipeline
parallelism, whole under tensor parallelism.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from workers.layouts import weighted_nll

from r1kern import distributed
from r1kern.types import Sequence

HALF = (60, 44, 24)  # rows of the sequences of a half: 128, one tile


def main(model: str, out: str, layouts: list[str]) -> None:
    found = {}
    for layout in layouts:
        tp, ep, pp = map(int, layout.split(","))
        world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
        micro_batches = 1 if tp > 1 or world.dp > 1 else 2
        found[layout] = run(world, model, micro_batches)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    distributed.shutdown()


def halves() -> list[list[Sequence]]:
    generator = torch.Generator().manual_seed(5)

    def ids(count):
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    return [[Sequence(ids(4), ids(rows - 3)) for rows in HALF] for _ in range(2)]


def run(world, model: str, micro_batches: int, **options) -> dict[str, float]:
    """Metrics of one update, and those of the weights after it.

    Args:
        options: of the model.
    """
    from r1kern.config import Model, Optim, Parallel
    from r1kern.train.packing import pack
    from r1kern.train.policy import Policy

    options = {"precision": "fp8_blockwise", "fp8_linears": True} | options
    policy = Policy(
        Model(path=str(model), dtype="float32", **options),
        Parallel(tp=world.tp, ep=world.ep, pp=world.pp),
        Optim(lr=1e-2, eps=1e-2),
        world,
        total_updates=2,
    )
    first, second = halves()
    mine = [(first, second)[world.dp_rank]] if world.dp > 1 else [first, second]
    if micro_batches == 1 and world.dp == 1:
        mine = [first + second]
    batches = [
        pack(part, budget=4000, dp=1, dp_rank=0, multiple=world.tp, hf=policy.hf)[0]
        for part in mine
    ]
    tokens = sum(len(s.completion_ids) for s in first + second)
    loss = weighted_nll({"tokens": tokens})
    metrics = policy.update(batches, loss)
    weights = sum(float(t.double().abs().sum()) for _, t in policy.export())
    return metrics | {"weights": weights}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
