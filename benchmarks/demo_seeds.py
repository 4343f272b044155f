"""The demo over several seeds: what `make demo` gains, where its time goes, what memory it takes.

Runs `r1kern demo` for every seed (one that is done already is only read) and writes
`results/demo.json` and `.md`.  The recipe was chosen on the validation split of the bundled
problems; what is reported here are the held-out ones.

    python benchmarks/demo_seeds.py --folder runs/seeds --seeds 0 1 2
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
from pathlib import Path

import psutil
from step_vs_trl import HERE, cpu_model

from r1kern.report.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        folder = args.folder / f"s{seed}"
        measured = {}
        if not (folder / "grpo" / "model").is_dir():
            measured = run_demo(folder, seed)
        rows.append({"seed": seed, **read_run(folder), **measured})
        write(rows)
        print(rows[-1], flush=True)


def run_demo(folder: Path, seed: int) -> dict[str, float]:
    """Minutes, and the peak of the memory of all its processes (shared pages counted once)."""
    command = [sys.executable, "-m", "r1kern", "demo", "--folder", str(folder), "--seed", str(seed)]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as demo:
        while demo.poll() is None:
            peak = max(peak, memory(demo.pid))
            time.sleep(1)
    if demo.returncode:
        sys.exit(f"the demo of seed {seed} ended with code {demo.returncode}")
    return {
        "minutes": round((time.monotonic() - started) / 60, 2),
        "peak_gib": round(peak / 2**30, 2),
    }


def memory(pid: int) -> int:
    """Proportional set size of a process and its children in bytes."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.NoSuchProcess:
        pass  # it ended while it was looked at
    return total


def read_run(folder: Path) -> dict:
    """Accuracy before and after, and the median step, from the run's own records."""
    records = read_metrics(folder / "grpo")
    evals = [r for r in records if "eval/pass@1" in r]
    steps = [r for r in records if "reward" in r]
    usual = [r for r in steps[1:] if "seconds/save" not in r]
    phases = sorted({k for r in usual for k in r if k.startswith("seconds/")})
    return {
        "before": round(evals[0]["eval/pass@1"], 4),
        "after": round(evals[-1]["eval/pass@1"], 4),
        "half_interval": round(evals[-1]["eval/half_interval"], 4),
        "max_mismatch": max(r["max_mismatch"] for r in steps),
        "steps": len(steps),
        "completions_per_step": 256,
        "tokens_per_step": round(statistics.median(r["tokens"] for r in usual)),
        "generated_tok_per_s": round(
            statistics.median(r["tokens"] / r["seconds/rollout"] for r in usual)
        ),
        "step_s": {
            k.removeprefix("seconds/"): round(statistics.median(r.get(k, 0.0) for r in usual), 3)
            for k in phases
        },
    }


def write(rows: list[dict]) -> None:
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "rows": rows,
    }
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# The demo ({report['date']}, {report['machine']})",
        "",
        "Written by `demo_seeds.py`. Held-out pass@1: 308 problems, 8 samples each, T 0.6, top-p",
        "0.95; the interval is 95 % over problems. Seconds: medians of a step of 256 completions.",
        "",
        "| seed | after cold start | after GRPO | gain | largest mismatch | step s | by phase |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        phases = ", ".join(f"{k} {v:.2f}" for k, v in r["step_s"].items() if k != "step" and v)
        lines.append(
            f"| {r['seed']} | {100 * r['before']:.1f} % | {100 * r['after']:.1f} +- "
            f"{100 * r['half_interval']:.1f} % | {100 * (r['after'] - r['before']):+.1f} | "
            f"{r['max_mismatch']:.1e} | {r['step_s']['step']:.2f} | {phases} |"
        )
    (results / "demo.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
