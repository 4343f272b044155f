"""Worker: two PPO updates of policy and critic on one global batch, for each of several layouts.

    torchrun ppo.py FOLDER OUT.json TP,PP,BUDGET;... CONFIG OVERRIDES ...

FOLDER holds `policy` and `critic`, a model with a scalar head.  Between the updates both are saved;
another pair is loaded from that, and goes on beside the first.  Then, in the same processes, the
whole run that CONFIG describes, with the reward of its own that `train.py` has.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from workers.train import variety

from r1kern import cli, distributed
from r1kern.cli import training
from r1kern.config import PPOConfig, load_config
from r1kern.types import Sequence


def main(folder: str, out: str, cases: str, config: str, *overrides: str) -> None:
    found = {}
    for case in cases.split(";"):
        tp, pp, budget = map(int, case.split(","))
        world = distributed.start(tp=tp, pp=pp, seed=0)
        found[case] = run(world, Path(folder), budget)
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    options = load_config(PPOConfig, config, list(overrides))
    world = distributed.start(seed=0)
    from r1kern.train.ppo import PPO

    training.drive(PPO(options, world, rewards={"variety": variety}), False)


def global_batch() -> list[Sequence]:
    """Ragged sequences, their rewards where GRPO's have the advantage."""
    generator = torch.Generator().manual_seed(5)

    def ids(count):
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    lengths = [1, 3, 40, 8, 13, 2, 21, 5]
    return [
        Sequence(ids(2 + i % 5), ids(n), 1.0 if i % 3 else -0.5, (-4.0,) * n)
        for i, n in enumerate(lengths)
    ]


def run(world, folder: Path, budget: int) -> dict:
    """Metrics of both updates, and those of the second from the checkpoint."""
    from r1kern.train.checkpoint import Checkpoints

    models = build(world, folder, 1.0)
    batches = prepare(world, models[0], budget)
    first = update(*models, batches)
    checkpoints = Checkpoints(folder / f"{world.tp},{world.pp},{world.dp},{budget}", keep_last=1)
    checkpoints.save(models[0], 1, {}, critic=models[1])
    second = update(*models, batches)
    others = build(world, folder, 0.5)  # other weights, which the checkpoint's replace
    checkpoints.load(others[0], checkpoints.latest(), critic=others[1])
    again = update(*others, batches)
    return {
        "updates": [first, second],
        "again": again,
        "versions": [model.version for model in others],
        "microbatches": len(batches),
        "equal": all(
            torch.equal(mine, theirs)
            for model, other in zip(models, others, strict=True)
            for (_, mine), (_, theirs) in zip(model.export(), other.export(), strict=True)
        ),
    }


def prepare(world, policy, budget: int):
    """This rank's micro-batches with old and, unlike them, reference log-probs."""
    from r1kern.train.packing import pack

    place = dict(dp=world.dp, dp_rank=world.dp_rank, multiple=world.tp)
    batches = pack(global_batch(), budget=budget, hf=policy.hf, **place)
    batches = with_grids(policy.logprobs(batches), batches, "old_logps")
    other = [b.old_logps + b.grid((b.targets % 5 - 2) * 0.1) for b in batches]
    return with_grids(other, batches, "ref_logps")


def build(world, folder: Path, scale: float):
    from r1kern.config import Model, Optim, Parallel
    from r1kern.train.policy import Policy

    models = []
    for name, lr in (("policy", 1e-3), ("critic", 1e-2)):
        model = Policy(
            Model(path=str(folder / name), dtype="float32"),
            Parallel(tp=world.tp, pp=world.pp),
            # A large epsilon keeps Adam from blowing rounding differences of tiny gradients up.
            Optim(lr=lr, eps=1e-2, schedule="cosine"),
            world,
            total_updates=5,
            scalar_head=name == "critic",
        )
        with torch.no_grad():
            for parameter in model.model.parameters():
                parameter.mul_(scale)
        models.append(model)
    return models


def update(policy, critic, batches) -> dict[str, float]:
    """One step of both as `PPO.step` does it."""
    from r1kern.config import GRPO, PPO
    from r1kern.train.ppo_objective import critic_loss, ppo_policy_loss, with_advantages

    num_tokens = sum(len(s.completion_ids) for s in global_batch())
    batches = with_grids(critic.values(batches), batches, "values")
    (batches,), metrics = with_advantages([batches], PPO(lam=0.95), 0.1)
    learnt = critic.update(batches, partial(critic_loss, clip=0.2, num_tokens=num_tokens))
    loss = partial(ppo_policy_loss, options=GRPO(), num_tokens=num_tokens)
    metrics |= policy.update(batches, loss) | {f"value/{k}": v for k, v in learnt.items()}
    return metrics | {"lr": policy.lr, "value/lr": critic.lr}


def with_grids(grids, batches, field: str):
    return [dataclasses.replace(b, **{field: g}) for b, g in zip(batches, grids, strict=True)]


if __name__ == "__main__":
    sys.argv, arguments = sys.argv[:1], sys.argv[1:]
    code = cli.guarded(lambda: main(*arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
