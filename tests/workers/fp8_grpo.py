"""Worker: GRPO steps with trainer and generator in FP8, the kept codes checked at every turn.

torchrun fp8_grpo.py OUT.json CONFIG MODEL RUN_FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from fp8_codes import check_codes, codes_of
from torch.utils._python_dispatch import TorchDispatchMode
from workers.train import variety

from r1kern import distributed
from r1kern.config import TrainConfig, load_config

OPTIONS = [
    "model.precision=fp8_blockwise",
    "model.fp8_linears=true",
    "generator.fp8=true",
    "rewards={variety: 1.0}",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_tokens=12",
    "grpo.beta=0.1",
    "grpo.updates_per_batch=2",
    "train.mismatch_limit=0",
]


class Quantisations(TorchDispatchMode):
    """Counts the weights' quantisations that bear transposed codes, which the trainer's do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.r1kern.fp8_quantize_weights.default and args[3]
        return func(*args, **(kwargs or {}))


def main(out: str, config: str, model: str, folder: str) -> None:
    world = distributed.start(seed=0)
    where = [f"model.path={model}", f"run.folder={folder}"]
    from r1kern.train.checkpoint import Checkpoints
    from r1kern.train.grpo import GRPO

    trainer = GRPO(
        load_config(TrainConfig, config, [*where, *OPTIONS]), world, rewards={"variety": variety}
    )
    policy = trainer.policy
    passes = watch(policy)
    checkpoints = Checkpoints(Path(folder) / "checkpoints", keep_last=2)
    found = {"products": len(list(codes_of(policy.model))), "steps": []}
    for _ in range(2):
        passes.clear()
        with Quantisations() as made:
            metrics = trainer.step()
        names = ("fp8_underflow", "fp8_nan", "mismatch", "max_mismatch")
        step = {name: metrics[name] for name in names}
        found["steps"].append(step | {"quantised": made.count, "passes": list(passes)})
        if len(found["steps"]) == 1:
            checkpoints.save(policy, 1, trainer.state())
    policy.logprobs(trainer.prepare(trainer.rollouts).batches)  # codes of weights that will be gone
    trainer.restore(checkpoints.load(policy, checkpoints.latest()))
    found["loaded"] = check_codes(policy.model)
    found["saved"], found["resumed"] = found["steps"][1]["mismatch"], trainer.step()["mismatch"]
    Path(out).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def watch(policy) -> list[tuple[str, int]]:
    """Notes, after each pass, how many codes are kept, all of them of the present weights."""
    passes: list[tuple[str, int]] = []

    def watched(name, method):
        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            passes.append((name, check(policy)))
            return result

        return call

    policy.logprobs = watched("logprobs", policy.logprobs)
    policy.update = watched("update", policy.update)
    policy._swap_reference = watched("reference", policy._swap_reference)
    return passes


def check(policy) -> int:
    """`check_codes`, not counted: without the mode that counts."""
    with torch.utils._python_dispatch._disable_current_modes():
        return check_codes(policy.model)


if __name__ == "__main__":
    main(*sys.argv[1:])
