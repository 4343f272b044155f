"""`r1kern demo`: the whole path of a reasoner on a laptop, with the engine's own commands.

A random tiny DeepSeek-V3 is given a cold start by `r1kern sft` and trained by `r1kern train`, both
under torchrun; what is printed at the end was measured by that run.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch

import r1kern
from r1kern.config import SFTConfig, TrainConfig, load_config
from r1kern.data.cold_start import write_cold_start
from r1kern.data.records import read_records
from r1kern.data.tiny_model import DEEPSEEK, write_model
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.errors import UserError
from r1kern.launch import launch
from r1kern.report.metrics import read_metrics

# Beside the package in a checkout, within it in a wheel.
CONFIGS = next(path for p in r1kern.__path__ if (path := Path(p) / "configs").is_dir())


FP8 = ["model.precision=fp8_blockwise", "model.fp8_linears=true"]
# vLLM on a CPU has FP8's weights but not its activations: log-probs differ by up to about 2.
FP8_GRPO = ["generator.fp8=true", "train.mismatch_limit=10"]


def run_demo(folder: Path, *, seed: int = 0, fresh: bool = False, fp8: bool = False) -> int:
    """Run or continue the demo; returns the exit code.

    Args:
        folder: everything is written here.
        seed: of the model, the data and the sampling.
        fresh: remove what an earlier demo left in `folder`.
        fp8: train in blockwise FP8, emulated on a CPU, and sample with FP8 weights.
    """
    started = time.monotonic()
    processes = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "cold_start.jsonl").is_file():
        write_inputs(folder, seed)
    at = [f"run.seed={seed}", f"run.folder={folder}"]
    precision = FP8 if fp8 else []
    print(f"[1/2] cold start: supervised fine-tuning of a random model -> {folder / 'sft'}")
    sft = [
        f"model.path={folder / 'base'}",
        f"data.train={folder / 'cold_start.jsonl'}",
        *at[:1],
        f"{at[1]}/sft",
        *precision,
    ]
    load_config(SFTConfig, CONFIGS / "demo_sft.yaml", sft)
    if not (folder / "sft" / "model").is_dir():
        code = launch(
            ["sft", str(CONFIGS / "demo_sft.yaml"), *sft, "--resume"], processes=processes
        )
        if code:
            return code
    print(f"[2/2] reinforcement learning: GRPO with vLLM rollouts -> {folder / 'grpo'}")
    grpo = [f"model.path={folder / 'sft' / 'model'}", *at[:1], f"{at[1]}/grpo", *precision]
    grpo += FP8_GRPO if fp8 else []
    load_config(TrainConfig, CONFIGS / "demo.yaml", grpo)
    if not (folder / "grpo" / "model").is_dir():
        code = launch(["train", str(CONFIGS / "demo.yaml"), *grpo, "--resume"], processes=processes)
        if code:
            return code
    print(summary(folder, time.monotonic() - started))
    return 0


def write_inputs(folder: Path, seed: int) -> None:
    """The untrained model's configuration and tokenizer, and the cold-start data."""
    write_model(folder / "base", DEEPSEEK, build_demo_tokenizer())
    records = read_records("bundled:gsm8k_arith_train", where={"kind": ["add", "sub"]})
    scratch = folder / "cold_start.tmp"
    write_cold_start([r.text("problem") for r in records], scratch, visits=8, seed=seed)
    scratch.rename(folder / "cold_start.jsonl")


def summary(folder: Path, seconds: float) -> str:
    """What the run measured, from its own records.

    Raises:
        UserError: the records hold no two evaluations.
    """
    records = read_metrics(folder / "grpo")
    evals = [r for r in records if "eval/pass@1" in r]
    steps = [r for r in records if "reward" in r]
    if len(evals) < 2:
        raise UserError(f"{folder}/grpo holds no evaluation before and after: use --fresh")
    before, after = evals[0], evals[-1]
    gain = 100 * (after["eval/pass@1"] - before["eval/pass@1"])
    worst = max(r["max_mismatch"] for r in steps)
    return f"""
held-out pass@1 (problems of GSM8K's test split that are not in training, 8 samples each):
  after the cold start   {100 * before["eval/pass@1"]:5.1f} % (+- {_half(before)})
  after {len(steps):3d} GRPO steps   {100 * after["eval/pass@1"]:5.1f} % (+- {_half(after)})
  gain                   {gain:+5.1f} points
What the gain is: mostly RL teaches the model to work a sum out before it answers and to mind the
carries, both of which the cold start showed it in a mix with careless and unworked answers
(response length {steps[0]["response_length"]:.1f} -> {steps[-1]["response_length"]:.1f} tokens).
Largest trainer/generator log-prob difference of any step: {worst:.1e}.
Time: {seconds / 60:.1f} minutes.
Files in {folder}:
  grpo/model             the trained model, in Hugging Face format
  grpo/report.html       the run on one page
  grpo/metrics.jsonl     every step's metrics and seconds by phase
  grpo/rollouts/         every sampled completion with its rewards
  grpo/tensorboard/      tensorboard --logdir {folder}/grpo/tensorboard"""


def _half(record: dict) -> str:
    return f"{100 * record['eval/half_interval']:.1f}"
