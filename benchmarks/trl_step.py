"""One GRPO step of Hugging Face TRL on CPU, timed: the baseline half of a step-time comparison.

Runs in an environment of its own (`requirements-trl.txt`).  A step is everything between two
optimizer updates: batch, generation with a KV cache, rewards, advantages, forward, backward,
clipping and AdamW.  The first step is a warm-up and is not counted.

    python benchmarks/trl_step.py --model FOLDER --completions 64 --tokens 44 --out row.json

Settings, each the fastest that does the same work (CPU seconds of a 1.0M DeepSeek-V3 on 2 cores):

- `use_cpu`, float32 weights and arithmetic (TRL's default here is bfloat16), gradient
  checkpointing off (TRL's default is on, and computes every forward twice).
- beta 0: no reference model.  The rest is the paper's (2501.12948): learning rate 3e-6, clip 10,
  temperature 1, mean over each completion's own tokens, one update per rollout.
- One micro-batch by default.  However it is cut, generation takes the whole batch at once, and TRL
  takes the policy's own forward as the old log-probs: no second forward.
- Eager attention: as fast as `sdpa` at 44 tokens and 20% less CPU time at 256, since MLA's keys and
  values differ in width and torch has no fused CPU kernel for that.
- `grouped_mm` experts, transformers' default: `eager` costs up to 20% more, `batched_mm` far more.
- A growing KV cache, also the default: `static` costs 20% more at 44 tokens, 40% at 256.
  Continuous batching fails on this architecture, for the same difference in width.
- Freed memory stays in the process (`--malloc default` for glibc's own ways): glibc hands tensors
  over 32 MiB back to the kernel and faults them in again at the next token.  Growing the KV cache
  of 256 x 256 takes less than half the CPU time so; 64 x 44 does not change.
- Threads or processes: `--processes 2` is data parallel over gloo with the same total of threads.
  Measure both where it matters and keep the better.
- TRL's vLLM path is not used: TRL 1.16 supports vLLM 0.22 to 0.31, on its own word.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def arithmetic_prompts(count: int) -> list[str]:
    """`count` distinct questions of 16 to 20 characters, always the same ones."""
    return [
        f"What is {10 + 7 * i % 90} {'+-*'[i % 3]} {10 ** (1 + i % 5) + i}?" for i in range(count)
    ]


def main() -> None:
    args = parse_args()
    if args.processes > 1 and "RANK" not in os.environ:
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        done = subprocess.run([sys.executable, "-m", *launch, *sys.argv], check=False)
        sys.exit(done.returncode)
    row = measure(args)
    if os.environ.get("RANK", "0") == "0":
        text = json.dumps(row, indent=1)
        print(text)
        if args.out:
            args.out.write_text(text + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one GRPO step of TRL on CPU.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face export (a folder)")
    parser.add_argument("--completions", type=int, default=64, help="completions a step")
    parser.add_argument("--tokens", type=int, default=44, help="tokens of every completion")
    parser.add_argument("--group", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of all processes")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes")
    parser.add_argument(
        "--micro-batch", type=int, help="completions a forward pass, per process (default: all)"
    )
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager")
    parser.add_argument("--malloc", choices=["keep", "default"], default="keep")
    parser.add_argument("--beta", type=float, default=0.0, help="KL weight; > 0 adds a reference")
    parser.add_argument("--out", type=Path, help="file for the JSON row")
    args = parser.parse_args()

    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} has no config.json: give --model a Hugging Face export")
    if min(args.completions, args.tokens, args.steps, args.threads, args.processes) < 1:
        parser.error("--completions, --tokens, --steps, --threads, --processes must be at least 1")
    if args.group < 2 or args.completions % args.group:
        parser.error(f"--completions {args.completions} is not whole groups of {args.group} >= 2")
    if args.completions % args.processes or args.threads % args.processes:
        parser.error(f"--processes {args.processes} must divide --completions and --threads")
    share = args.completions // args.processes
    args.micro_batch = args.micro_batch or share
    if args.micro_batch < 1 or share % args.micro_batch:
        parser.error(f"--micro-batch {args.micro_batch} must divide {share} completions a process")
    return args


def measure(args: argparse.Namespace) -> dict:
    """Warm up, time `args.steps` steps, check that they were whole, and return the row.

    Returns:
        `step_s` is the median step in seconds (of an even number, the lower middle one), `phases_s`
        the phases of that same step, which sum to it, and `steps_s` every timed step in order.

    Raises:
        RuntimeError: a completion was not `args.tokens` long, or no parameter changed.
    """
    import torch

    load_before = os.getloadavg()[0]
    torch.set_num_threads(args.threads // args.processes)
    if args.malloc == "keep":
        keep_freed_memory()
    prompts = arithmetic_prompts(args.completions // args.group)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, steps = build_trainer(args, prompts, scratch)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
    if all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)):
        raise RuntimeError("no parameter changed: what was timed is not a training step")

    timed = steps[1:]
    median = statistics.median_low(step["total"] for step in timed)
    phases = next(step for step in timed if step["total"] == median)
    lengths = [len(trainer.processing_class(prompt)["input_ids"]) for prompt in prompts]
    return {
        "engine": "trl",
        "completions": args.completions,
        "tokens": args.tokens,
        "group": args.group,
        "beta": args.beta,
        "prompt_tokens": [min(lengths), max(lengths)],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "step_s": round(median, 4),
        "phases_s": {name: round(s, 4) for name, s in phases.items() if name != "total"},
        "steps_s": [round(step["total"], 4) for step in timed],
        "tok_per_s": round(args.completions * args.tokens / median, 1),
        "threads": args.threads,
        "processes": args.processes,
        "micro_batch": args.micro_batch,
        "attention": args.attention,
        "malloc": args.malloc,
        "versions": {name: version(name) for name in ("torch", "trl", "transformers")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_before": round(load_before, 2),
    }


def build_trainer(args: argparse.Namespace, prompts: list[str], scratch: str) -> tuple:
    """TRL's trainer on `args.model`, and the list that gets one dict of phase seconds a step."""
    import datasets
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=args.attention
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    check_fits(model.config, tokenizer, prompts, args.tokens)

    spent = dict.fromkeys(("rollout", "generate", "reward", "forward"), 0.0)
    steps: list[dict] = []

    def timed(phase: str, method):
        def run(*a, **kw):
            start = time.perf_counter()
            result = method(*a, **kw)
            spent[phase] += time.perf_counter() - start
            return result

        return run

    class Timed(GRPOTrainer):
        """TRL reports its phases to trackers only, so they are timed around its own methods."""

        _generate_and_score_completions = timed(
            "rollout", GRPOTrainer._generate_and_score_completions
        )
        _generate_single_turn = timed("generate", GRPOTrainer._generate_single_turn)
        _calculate_rewards = timed("reward", GRPOTrainer._calculate_rewards)
        _compute_loss = timed("forward", GRPOTrainer._compute_loss)

    class StepClock(transformers.TrainerCallback):
        """From one end of step to the next, so that nothing between two updates is left out."""

        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            total = now - self.start
            steps.append(
                {
                    "total": total,
                    "generate": spent["generate"],
                    "reward": spent["reward"],
                    "bookkeeping": spent["rollout"] - spent["generate"] - spent["reward"],
                    "forward": spent["forward"],
                    "backward_update": total - spent["rollout"] - spent["forward"],
                }
            )
            self.start = now
            spent.update(dict.fromkeys(spent, 0.0))

    def parity_reward(completion_ids: list[list[int]], **_) -> list[float]:
        if {len(ids) for ids in completion_ids} != {args.tokens}:
            raise RuntimeError(f"a completion is not {args.tokens} tokens: EOS was not held back")
        # Next to free, and almost never equal across a group: an update must have a gradient.
        return [float(sum(ids) % 2) for ids in completion_ids]

    config = GRPOConfig(
        output_dir=scratch,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        max_steps=args.steps + 1,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.completions // args.processes // args.micro_batch,
        num_generations=args.group,
        max_completion_length=args.tokens,
        generation_kwargs={"min_new_tokens": args.tokens},
        temperature=1.0,
        beta=args.beta,
        epsilon=10.0,
        loss_type="grpo",
        learning_rate=3e-6,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Timed(
        model=model,
        reward_funcs=parity_reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[StepClock()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, steps


def keep_freed_memory() -> None:
    """Tell glibc to serve every size from the heap and never to shrink it (mallopt(3)).

    Raises:
        RuntimeError: glibc refused.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, -1)):
        raise RuntimeError("glibc refused mallopt: run with --malloc default")


def check_fits(config, tokenizer, prompts: list[str], tokens: int) -> None:
    """The model must take the prompts as they are: no unknown tokens, and room for `tokens` more.

    Raises:
        ValueError: it cannot; says what is missing.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ValueError(f"unknown characters in {prompt!r}: use a model that has them all")
    need = max(map(len, encoded)) + tokens
    if need > config.max_position_embeddings:
        raise ValueError(
            f"prompt + completion is {need} tokens, over the model's max_position_embeddings "
            f"{config.max_position_embeddings}: lower --tokens"
        )


if __name__ == "__main__":
    main()
