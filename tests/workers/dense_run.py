"""Worker: fine-tuning, then GRPO of dense models, then the generator against one fresh from disk.

    torchrun dense_run.py ROOT MODEL ... -- OVERRIDE ...

Writes ROOT/MODEL/found.json.  Overrides are of the GRPO run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launch import ROOT
from workers.generate import off_from_transformers, replaced, tokens_and_logps
from workers.train import variety

from r1kern import distributed
from r1kern.config import SFTConfig, TrainConfig, load_config
from r1kern.generate import vllm_cpu


def main(root: Path, models: list[str], overrides: list[str]) -> None:
    parallel = load_config(TrainConfig, ROOT / "configs/demo.yaml", overrides).parallel
    world = distributed.start(tp=parallel.tp, pp=parallel.pp, seed=0)
    for model in models:
        sft = fine_tune(world, root / model, parallel)
        found = reinforce(world, root / model, overrides) | {"sft": sft}
        if world.is_main:
            (root / model / "found.json").write_text(json.dumps(found))
    distributed.shutdown()


def fine_tune(world, folder: Path, parallel) -> list[float]:
    """Losses of three updates of the base model; leaves the model in `folder/sft`."""
    from r1kern.train.sft import SFT

    overrides = [
        f"model.path={folder / 'base'}",
        "model.init=load",
        f"data.train={folder.parent / 'pairs.jsonl'}",
        "train.batch_size=4",
        "optim.lr=1e-3",
        f"parallel.tp={parallel.tp}",
        f"parallel.pp={parallel.pp}",
    ]
    trainer = SFT(load_config(SFTConfig, ROOT / "configs/demo_sft.yaml", overrides), world)
    losses = [trainer.step()["loss"] for _ in range(3)]
    trainer.policy.save_hf(folder / "sft")
    return losses


def reinforce(world, folder: Path, overrides: list[str]) -> dict:
    """Mismatch of two GRPO steps; the updated generator and a fresh one on the same prompts."""
    from r1kern.generate import Generator
    from r1kern.train.grpo import GRPO

    options = [
        f"model.path={folder / 'sft'}",
        f"run.folder={folder / 'run'}",
        "rewards={variety: 1.0}",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "rollout.max_tokens=40",
        "grpo.beta=0.01",
        "optim.lr=1e-3",
        "train.steps=2",
        *overrides,
    ]
    config = load_config(TrainConfig, ROOT / "configs/demo.yaml", options)
    trainer = GRPO(config, world, rewards={"variety": variety})
    found = {"steps": [trainer.step() for _ in range(2)]}
    found["off without the remedy"] = without_remedy(trainer, folder / "before")
    trainer.policy.save_hf(folder / "model")
    prompts = [rollout.prompt for rollout in trainer.rollouts]
    synced = trainer.generator.generate(prompts, trainer.sampling, seed=5)
    trainer.generator.close()
    fresh = Generator(
        folder / "model",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=64,
        device=world.device.type,
        kv_cache_gib=0.125,
        tensor_parallel=config.parallel.generator_tp,
    )
    found["equal"] = tokens_and_logps(synced) == tokens_and_logps(
        fresh.generate(prompts, trainer.sampling, seed=5)
    )
    fresh.close()
    found["off"] = off_from_transformers(folder / "model", synced)
    return found


def without_remedy(trainer, folder: Path) -> float:
    """Mismatch after a sync that leaves tied heads as they were packed, of a halved embedding."""
    from r1kern.model.local import local_tensors

    for name, tensor, _ in local_tensors(trainer.policy.model):
        if name == "embedding.word_embeddings.weight":
            tensor.mul_(0.5)
    with replaced(vllm_cpu, "pack_tied_heads", lambda model, tied: None):
        trainer.sync()
    trainer.policy.save_hf(folder)
    prompts = [rollout.prompt for rollout in trainer.rollouts]
    sampled = trainer.generator.generate(prompts, trainer.sampling, seed=5)
    trainer.sync()
    return off_from_transformers(folder, sampled)


if __name__ == "__main__":
    words = sys.argv[1:]
    end = words.index("--")
    main(Path(words[0]), words[1:end], words[end + 1 :])
