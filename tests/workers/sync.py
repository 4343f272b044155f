"""Worker: what `test_sync.py` judges.

    torchrun sync.py MODEL OUT GENERATOR_TP BUCKET_KIB TP,EP,PP ...

One vLLM layout in a process, one trainer layout after the other.  For each: the exported weights
against the folder's, buffers alive against the plan, an update, a sync in small buckets, and the
log-probs of what is then sampled against the trainer's.  Every rank writes OUT/RANK.json.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workers.generate import build, error_of, prompts

from r1kern import distributed
from r1kern.agreement import Disagreement, agree
from r1kern.generate import Sampling, sleep
from r1kern.types import Sequence

UPDATED = {"lr": 1e-2, "eps": 1e-2}


class Messages(logging.Handler):
    """What was logged."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators made within the block and that are alive."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tensors_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def export(policy, plan, truth: dict[str, torch.Tensor]) -> dict:
    """Order and values of the stream, and the bytes alive while it passes."""
    names, wrong = [], []
    with Allocations() as allocations:
        for bucket in policy.export_buckets(plan):
            names += [name for name, _ in bucket]
            moved = [tensor.untyped_storage() for _, tensor in bucket]
            lent = [StorageWeakRef(s) for s in moved if s.data_ptr() not in own_storages(policy)]
            del bucket, moved
            wait_for(lambda lent=lent: all(ref.expired() for ref in lent))
    for name, tensor in policy.export():
        same = tensor.dtype == truth[name].dtype and torch.equal(tensor, truth[name])
        wrong += [] if same else [name]
    from r1kern.hf.names import hf_shapes

    return {
        "wrong": wrong,
        "ordered": names == list(hf_shapes(policy.hf)),
        "buckets": len(plan.buckets),
        "planned": plan.peak_bytes,
        "measured": allocations.peak,
    }


def own_storages(policy) -> set[int]:
    state = policy.model.state_dict().values()
    return {t.untyped_storage().data_ptr() for t in state if t is not None}


def wait_for(condition) -> None:
    """gloo's threads let go of a tensor a moment after the collective."""
    end = time.monotonic() + 0.5
    while not condition() and time.monotonic() < end:
        time.sleep(1e-4)


def watched(buckets, own: set[int], kept: list[int]):
    """Passes buckets on; counts storages of the last that are alive when the next is asked for."""
    iterator, lent = iter(buckets), []
    while True:
        wait_for(lambda lent=lent: all(ref.expired() for ref in lent))
        kept.append(sum(not ref.expired() for ref in lent))
        bucket = next(iterator, None)
        if bucket is None:
            return
        storages = [tensor.untyped_storage() for _, tensor in bucket]
        lent = [StorageWeakRef(s) for s in storages if s.data_ptr() not in own]
        del storages
        yield bucket
        del bucket


def off_from_trainer(policy, generator) -> float:
    """Largest difference of a sampled log-prob from the trainer's."""
    from r1kern.train.packing import pack

    rollouts = generator.generate(prompts(4), Sampling(n=2, max_tokens=16), seed=3)
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [c.ids for r in rollouts for c in r.completions])
    assert all(ids == everyones[0] for ids in everyones), "engines of equal weights differ"
    sequences = [
        Sequence(r.prompt.ids, c.ids, 0.0, c.logps) for r in rollouts for c in r.completions
    ]
    world = policy.world
    batches = pack(sequences, budget=400, dp=world.dp, dp_rank=world.dp_rank, multiple=world.tp)
    grids = policy.logprobs(batches)
    differences = [
        ((grid - batch.sampled_logps) * batch.mask).abs().max()
        for grid, batch in zip(grids, batches, strict=True)
    ]
    worst = torch.stack(differences).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


def update(policy) -> None:
    from r1kern.train.packing import pack

    gen = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 96, (8, 40), generator=gen).tolist()
    sequences = [Sequence(tuple(row[:4]), tuple(row[4:])) for row in ids]
    world = policy.world
    batches = pack(sequences, budget=400, dp=world.dp, dp_rank=world.dp_rank, multiple=world.tp)

    def loss(head, batch):
        value = -head.logprobs()[0].sum() / 288
        return value, {}

    policy.update(batches, loss)


def layout(model: str, sizes: tuple[int, int, int], generator, bucket_kib: int) -> dict:
    tp, ep, pp = sizes
    world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
    from r1kern.config import Model, Optim, Parallel
    from r1kern.hf.names import hf_shapes, hf_splits
    from r1kern.model.sync_plan import plan_sync
    from r1kern.train.policy import Policy

    policy = Policy(
        Model(path=model, dtype="float32"),
        Parallel(tp=tp, ep=ep, pp=pp),
        Optim(**UPDATED),
        world,
        total_updates=10,
    )
    shapes = hf_shapes(policy.hf)
    plan = plan_sync(
        shapes,
        hf_splits(shapes),
        dtype=torch.float32,
        tp=tp,
        ep=ep,
        layers=[policy.hf.num_hidden_layers // pp] * pp,
        experts=policy.hf.n_routed_experts,
        bucket_bytes=bucket_kib << 10,
    )
    out = export(policy, plan, load_file(Path(model) / "model.safetensors"))
    update(policy)
    kept: list[int] = []
    buckets = watched(policy.export_buckets(plan), own_storages(policy), kept)
    report = generator.sync(buckets, shapes, 1)
    out["bytes"], out["planned bytes"], out["kept"] = report.bytes, plan.total_bytes, max(kept)
    out["off"] = off_from_trainer(policy, generator)
    return out


def agreements() -> dict:
    """Ranks with one value, with different ones, and one that never comes."""
    rank = dist.get_rank()
    for _ in range(3):
        agree("equal", {"a": 1}, deadline_s=20)
    out = {"different": caught("different", f"v{rank}"), "after": caught("different", "v")}
    if rank != 1:
        out["absent"] = caught("absent", "v", 1.0)
    dist.barrier()
    return out


def caught(what: str, value: str, deadline_s: float = 20) -> str:
    try:
        agree(what, {"v": value}, deadline_s=deadline_s)
    except Disagreement as error:
        return str(error)
    return "agreed"


def main(model: str, out: str, generator_tp: str, bucket_kib: str, *layouts: str) -> None:
    distributed.start(seed=0)
    measured = {"agreements": agreements()}
    refused = error_of(lambda: build(Path(model), quantized=True))
    said = Messages()
    logging.getLogger("r1kern").addHandler(said)
    logging.getLogger("r1kern").setLevel(logging.INFO)
    generator = build(
        Path(model), tensor_parallel=int(generator_tp), load_weights=False, can_sleep=True
    )
    measured["fp8 on CPU"] = refused
    for text in layouts:
        sizes = tuple(map(int, text.split(",")))
        measured[text] = layout(model, sizes, generator, int(bucket_kib))
        gc.collect()
    (held,) = generator._llm.collective_rpc(sleep.held_bytes)
    weights = load_file(Path(model) / "model.safetensors").values()
    measured |= {"held": held, "weights": sum(t.nbytes for t in weights)}
    measured["generator_tp"] = int(generator_tp)
    measured["slept"] = generator.sleep() is not None
    generator.wake("weights")
    measured["said"] = sum("does not sleep on cpu" in message for message in said.messages)
    (Path(out) / f"{dist.get_rank()}.json").write_text(json.dumps(measured))
    dist.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
