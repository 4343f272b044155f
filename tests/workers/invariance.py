"""Worker: two GRPO updates of the same global batch for each of several layouts.

    torchrun invariance.py FOLDER OUT.json MODEL:TP,EP,PP,BUDGET[:FAULT] ...

FOLDER holds the models and the batch that `batch()` makes.  A FAULT takes one of the remedies
against Megatron-core 0.16.1's wrong gradients away.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from r1kern import distributed
from r1kern.types import Sequence


def main(folder: str, out: str, cases: list[str]) -> None:
    found = {}
    for case in cases:
        model, layout, *fault = case.split(":")
        tp, ep, pp, budget = map(int, layout.split(","))
        world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
        with FAULTS[fault[0]]() if fault else patch.dict({}):
            found[case] = run(world, Path(folder) / model, budget)
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    distributed.shutdown()


def batch() -> list[Sequence]:
    """Ragged sequences, one far longer than the rest; their advantages leave a loss far from 0."""
    generator = torch.Generator().manual_seed(5)

    def ids(count):
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    lengths = [1, 3, 70, 8, 13, 2, 21, 34, 5, 12, 17, 29]
    return [
        Sequence(ids(2 + i % 5), ids(n), (1 if i % 3 else -1) * (0.5 + i / 7), (-4.0,) * n)
        for i, n in enumerate(lengths)
    ]


def run(world, model: Path, budget: int) -> list[dict[str, float]]:
    """Metrics of two updates on one batch: plain first, then with the reference model's KL."""
    from r1kern.config import GRPO, Model, Optim, Parallel
    from r1kern.train.objective import counts, grpo_step_loss
    from r1kern.train.packing import pack
    from r1kern.train.policy import Policy

    policy = Policy(
        Model(path=str(model), dtype="float32"),
        Parallel(tp=world.tp, ep=world.ep, pp=world.pp),
        # A large epsilon keeps Adam from blowing rounding differences of tiny gradients up.
        Optim(lr=1e-3, eps=1e-2),
        world,
        total_updates=2,
    )
    policy.keep_reference()
    sequences = batch()
    place = dict(dp=world.dp, dp_rank=world.dp_rank, multiple=world.tp)
    batches = pack(sequences, budget=budget, hf=policy.hf, **place)
    batches = with_logps(policy, batches, "old_logps")
    size = counts(sequences)
    fixed = dict(denominators=size, trained_tokens=size["num_tokens"], max_tokens=80)
    found = []
    for beta in (0.0, 0.2):
        if beta:
            with policy.reference():
                batches = with_logps(policy, batches, "ref_logps")
        loss = partial(grpo_step_loss, options=GRPO(beta=beta, normalizer="token"), **fixed)
        found.append(policy.update(batches, loss))
    return [{**metrics, "microbatches": len(batches)} for metrics in found]


def with_logps(policy, batches, field: str):
    grids = policy.logprobs(batches)
    return [dataclasses.replace(b, **{field: g}) for b, g in zip(batches, grids, strict=True)]


# -- faults of Megatron-core 0.16.1 ---------------------------------------------------------------


@contextmanager
def column_parallel_down():
    """The local spec as it is: MLA's down projections sharded by columns."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from r1kern.hf import names
    from r1kern.model import gpt

    sharded = {
        name: (hf, 0) for name, (hf, _) in names.LAYER.items() if name.endswith("_down_proj.weight")
    }
    with (
        patch.object(gpt, "DuplicatedLinear", ColumnParallelLinear),
        patch.object(gpt, "MLASelfAttention", MLASelfAttention),
        patch.dict(names.LAYER, sharded),
    ):
        yield


@contextmanager
def expert_mark(name: str, value: bool):
    """The experts' weights marked as Megatron marks them."""
    from r1kern.model.moe import GroupedLinear

    build = GroupedLinear.__init__

    def marked(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for weight in self.parameters():
            setattr(weight, name, value)

    with patch.object(GroupedLinear, "__init__", marked):
        yield


FAULTS = {
    "column_parallel_down": column_parallel_down,
    "allreduce": partial(expert_mark, "allreduce", True),
    "tensor_model_parallel": partial(expert_mark, "tensor_model_parallel", False),
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
