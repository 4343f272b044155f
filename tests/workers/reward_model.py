"""Worker: reward models under several layouts, their scores, a run that learns and one resumed.

    torchrun reward_model.py ROOT TP,EP,PP,BUDGET ...

ROOT holds models, preferences and rollouts (see `test_reward_model.world`); writes
ROOT/{tp}_{ep}_{pp}_{budget}.pt for each layout and what `learn` and `resume` found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from r1kern import distributed
from r1kern.config import RewardConfig, RewardModel, parse_config
from r1kern.report.rollouts import read_rollouts

OPTIM = {"lr": 1e-2, "eps": 1e-2, "clip_grad": 0.0}


def main(root: Path, layouts: list[str]) -> None:
    for layout in layouts:
        tp, ep, pp, budget = map(int, layout.split(","))
        world = distributed.start(tp=tp, ep=ep, pp=pp, seed=0)
        found = train(world, root, budget) | score(world, root, budget)
        if world.is_main:
            torch.save(found, root / f"{tp}_{ep}_{pp}_{budget}.pt")
        dist.barrier()
    world = distributed.start(seed=0)
    learn(world, root)
    resume(world, root)
    distributed.shutdown()


def config(root: Path, world=None, *, data=None, train=None, optim=None, **more) -> RewardConfig:
    parallel = {"tp": world.tp, "ep": world.ep, "pp": world.pp} if world else {}
    options = {
        "model": {"path": str(root / "deepseek"), "dtype": "float32", "max_positions": 128},
        "data": {"train": str(root / "pairs.jsonl"), "template": "none", **(data or {})},
        "train": {"steps": 3, "batch_size": 6, **(train or {})},
        "optim": optim or OPTIM,
        "parallel": parallel,
    }
    return parse_config(RewardConfig, options | more)


def train(world, root: Path, budget: int) -> dict:
    """Three updates, metrics before and after on held-out pairs, the weights."""
    from r1kern.train.reward_model import RewardTrainer

    options = config(
        root,
        world,
        data={"eval": str(root / "eval.jsonl")},
        train={"tokens_per_microbatch": budget},
    )
    trainer = RewardTrainer(options, world)
    found = {"before": trainer.evaluate()[0]}
    found["steps"] = [trainer.step() for _ in range(3)]
    found["after"] = trainer.evaluate()[0]
    found["weights"] = {name: tensor.clone() for name, tensor in trainer.policy.export()}
    trainer.policy.save_hf(root / "trained")
    return found


def score(world, root: Path, budget: int) -> dict:
    """Of the same rollouts by two frozen models."""
    from r1kern.train.reward_scorer import RewardModels

    like = config(root).model
    models = RewardModels(
        {
            "harmless": RewardModel(path=str(root / "deepseek")),
            "helpful": RewardModel(path=str(root / "qwen2"), reads="summary"),
        },
        world,
        like=like,
        parallel=config(root, world).parallel,
        tokens_per_microbatch=budget,
    )
    rollouts = read_rollouts(root / "rollouts.jsonl")
    return {"scores": models.score(rollouts), "step_scores": models.step_scores(rollouts)}


def learn(world, root: Path) -> None:
    """A planted preference, from a language model's folder."""
    from r1kern.train import loop
    from r1kern.train.reward_model import RewardTrainer

    options = config(
        root,
        model={"path": str(root / "base"), "dtype": "float32", "max_positions": 128},
        data={"train": str(root / "planted.jsonl"), "held_out": 0.25, "reads": "summary"},
        train={"steps": 40, "batch_size": 16, "tokens_per_microbatch": 2000},
        optim={"lr": 2e-3},
        run={"folder": str(root / "learnt")},
    )
    loop.run(RewardTrainer(options, world))


def resume(world, root: Path) -> None:
    """Four steps at once, and two and two."""
    from r1kern.train import loop
    from r1kern.train.reward_model import RewardTrainer

    def run(name: str, steps: int, *, again: bool = False) -> None:
        options = config(
            root,
            world,
            run={"folder": str(root / name)},
            train={"steps": steps, "save_every": 2, "tokens_per_microbatch": 200},
        )
        loop.run(RewardTrainer(options, world), resume=again)

    run("whole", 4)
    run("parts", 2)
    run("parts", 4, again=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
