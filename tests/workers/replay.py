"""Worker: router replay under one layout after another; asserts, writes the agreement rates.

torchrun replay.py MODEL_FOLDER OUT.json TP,EP,PP[,recompute] ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from invariance import batch

from r1kern import distributed


def main(model: str, out: str, layouts: list[str]) -> None:
    found = {}
    for layout in layouts:
        sizes = layout.removesuffix(",recompute")
        tp, ep, pp = map(int, sizes.split(","))
        world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
        found[layout] = run(world, model, recompute=layout.endswith("recompute"))
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    distributed.shutdown()


def run(world, model: str, *, recompute: bool) -> dict:
    from r1kern.config import Model, Optim, Parallel
    from r1kern.model.replay import playing
    from r1kern.train.packing import pack
    from r1kern.train.policy import Policy

    policy = Policy(
        Model(path=model, dtype="float32"),
        Parallel(tp=world.tp, ep=world.ep, pp=world.pp),
        Optim(lr=1e-2, clip_grad=0.0),
        world,
        total_updates=5,
    )
    if recompute:
        policy.config.recompute_granularity = "full"
        policy.config.recompute_method = "uniform"
        policy.config.recompute_num_layers = 1
    place = dict(dp=world.dp, dp_rank=world.dp_rank, multiple=world.tp)
    batches = pack(batch(), budget=90, **place)
    with policy.record_experts() as choices:
        old = policy.logprobs(batches)
    with playing(policy.model, choices, replay=True):
        again = policy.logprobs(batches)
    assert all(map(torch.equal, old, again)), "replay of unchanged weights changed a log-prob"

    used = spy(policy, recompute)
    rates = []
    for replay in (False, True, True):
        used.clear()
        metrics = policy.update(batches, loss, choices=choices, replay=replay)
        rates.append(metrics["router_agreement"])
        if replay:
            assert same(choices, used), "another choice was used than the recorded one"
    assert not same(choices, own_choices(policy, batches)), "the update moved no router"
    return {"rates": rates, "microbatches": len(batches), "grad_norm": metrics["grad_norm"]}


def loss(head, batch):
    return -head.logprobs()[0].sum() / 100, {}


def spy(policy, recompute: bool) -> list:
    """Every [T, K] that the experts' dispatchers are given, by router, in micro-batch order."""
    from r1kern.model.moe import MoELayer

    layers = [m for m in policy.model.modules() if isinstance(m, MoELayer)]
    used: list = []

    def listen(dispatcher, index):
        preprocess = dispatcher.dispatch_preprocess

        def told(tokens, routing, weights):
            # Of a recomputed layer the second forward is what the gradient is of.
            if torch.is_grad_enabled():
                used.append((index, routing.indices))
            return preprocess(tokens, routing, weights)

        dispatcher.dispatch_preprocess = told

    for index, layer in enumerate(layers):
        listen(layer.token_dispatcher, index)
    return used


def own_choices(policy, batches):
    with policy.record_experts() as choices:
        policy.logprobs(batches)
    return [(i, c) for i, of_router in enumerate(choices) for c in of_router]


def same(choices, used) -> bool:
    """Bitwise, router by router; on every rank."""
    here = all(
        len(recorded) == len([u for j, u in used if j == i])
        and all(map(torch.equal, map(torch.Tensor.long, recorded), [u for j, u in used if j == i]))
        for i, recorded in enumerate(choices)
    )
    everywhere = torch.tensor(int(here))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
