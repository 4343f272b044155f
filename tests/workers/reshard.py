"""Worker: checkpoints saved in each layout and gone on from in each.

    torchrun reshard.py MODEL_FOLDER OUT TP,EP,PP ...

Takes the layouts in turn; one may come twice.  Each writes, the first time, OUT/LAYOUT/ (a run
folder with a checkpoint of two updates, saved in the background of the updates that follow) and
OUT/LAYOUT.pt (metrics and weights of those updates), and then goes on from every checkpoint of the
turns before that it has not gone on from.  OUT/result.json: how far it comes out from them.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch

from r1kern import distributed
from r1kern.types import Sequence

STEPS = 2


def main(model: str, out: Path, layouts: list[str]) -> None:
    saved, result = [], {}
    for layout in layouts:
        policy = build(model, layout)
        first = layout not in saved
        if first:
            save(policy, out, layout)
        for there in saved:
            if (name := f"{there} -> {layout}") not in result:
                result[name] = compare(policy, out, there)
        if first:
            saved.append(layout)
    if policy.world.is_main:
        (out / "result.json").write_text(json.dumps(result))
    distributed.shutdown()


def build(model: str, layout: str):
    tp, ep, pp = map(int, layout.split(","))
    return policy_of(distributed.start(tp=tp, ep=ep, pp=pp, seed=0), model)


def policy_of(world, model: str):
    from r1kern.config import Model, Optim, Parallel
    from r1kern.train.policy import Policy

    return Policy(
        Model(path=model, dtype="float32"),
        Parallel(tp=world.tp, ep=world.ep, pp=world.pp),
        # A large epsilon keeps Adam from blowing rounding differences of tiny gradients up.
        Optim(lr=1e-2, eps=1e-2, schedule="linear", weight_decay=0.1),
        world,
        total_updates=8,
    )


def save(policy, out: Path, layout: str) -> None:
    from r1kern.train.checkpoint import Checkpoints

    checkpoints = Checkpoints(out / layout, keep_last=1, background=True)
    updates(policy)
    checkpoints.save(policy, STEPS, {})
    truth = {"at": weights(policy), "metrics": updates(policy), "after": weights(policy)}
    checkpoints.finish()
    if policy.world.is_main:
        torch.save(truth, out / f"{layout}.pt")
    torch.distributed.barrier()


def compare(policy, out: Path, saved: str) -> dict:
    """Differences from the run that was saved: loaded weights, later metrics, later weights."""
    from r1kern.train.checkpoint import Checkpoints

    truth = torch.load(out / f"{saved}.pt")
    checkpoints = Checkpoints(out / saved, keep_last=1)
    state = checkpoints.load(policy, checkpoints.latest())
    loaded = difference(weights(policy), truth["at"])
    metrics = [
        abs(mine[name] / theirs[name] - 1)
        for mine, theirs in zip(updates(policy), truth["metrics"], strict=True)
        for name in ("loss", "entropy", "grad_norm")
    ]
    after = difference(weights(policy), truth["after"])
    return {
        "step": state["step"],
        "version": policy.version,
        "loaded": loaded,
        "metrics": max(metrics),
        "after": after,
    }


def updates(policy) -> list[dict]:
    from r1kern.train.packing import pack
    from r1kern.train.sft import sft_loss

    sequences = [
        Sequence(
            tuple(3 + (7 * i + j) % 90 for j in range(2 + i % 5)),
            tuple(3 + (5 * i + 11 * j) % 90 for j in range(1 + 3 * i)),
        )
        for i in range(8)
    ]
    world = policy.world
    batches = pack(sequences, budget=64, dp=world.dp, dp_rank=world.dp_rank, multiple=world.tp)
    tokens = sum(len(s.completion_ids) for s in sequences)
    loss = partial(sft_loss, num_tokens=tokens)
    return [policy.update(batches, loss) for _ in range(STEPS)]


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.export()}


def difference(mine: dict, theirs: dict) -> float:
    """The largest relative difference of a tensor."""
    return max(
        ((mine[name] - tensor).norm() / (tensor.norm() + 1e-9)).item()
        for name, tensor in theirs.items()
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
