"""A GRPO step of r1kern beside one of TRL: same model, prompts, group size and token counts.

Both run on this machine in one go, in turn, shape by shape; TRL as one process and as two, the
faster of which counts (the largest shape takes minutes a step: once, as the shape before it was
faster).  Writes `results/step_vs_trl.json` and `.md`.

    python benchmarks/step_vs_trl.py --model FOLDER --trl-python VENV_OF_TRL/bin/python
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = ((64, 44), (256, 44), (64, 256), (256, 256))
AIMS = {(64, 44): 1, (256, 44): 3, (64, 256): 5, (256, 256): 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face export (a folder)")
    parser.add_argument("--trl-python", required=True, help="python of requirements-trl.txt")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    rows, processes = [], (1, 2)
    for completions, tokens in SHAPES:
        shape = ["--completions", str(completions), "--tokens", str(tokens)]
        # A step of minutes is timed once; shorter ones more often.
        steps = 1 if completions * tokens > 60_000 else args.steps
        common = ["--model", str(args.model), *shape]
        ours = measure(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            HERE / "grpo_step.py",
            [*common, "--steps", str(args.steps)],
        )
        trl = [
            measure(
                [args.trl_python],
                HERE / "trl_step.py",
                [*common, "--steps", str(steps), "--processes", str(n)],
            )
            for n in processes
        ]
        best = min(trl, key=lambda row: row["step_s"])
        if (completions, tokens) == SHAPES[-2]:
            processes = (best["processes"],)
        rows.append(
            {
                "completions": completions,
                "tokens": tokens,
                "r1kern": ours,
                "trl": best,
                "trl_all": [row["step_s"] for row in trl],
                "ratio": round(best["step_s"] / ours["step_s"], 2),
                "aim": AIMS[completions, tokens],
            }
        )
        print(f"{completions} x {tokens}: {rows[-1]['ratio']} x TRL", flush=True)
        write(rows)


def measure(launcher: list[str], script: Path, arguments: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "row.json"
        command = [*launcher, str(script), *arguments, "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} if "-m" in launcher else os.environ
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{script.name} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def write(rows: list[dict]) -> None:
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "rows": rows,
    }
    (results / "step_vs_trl.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# A GRPO step beside TRL's ({report['date']}, {report['machine']})",
        "",
        "Written by `step_vs_trl.py`. TRL 1.16 with its Hugging Face generation (the better of one",
        "process and two); r1kern on two processes. Same tiny DeepSeek-V3, prompts, group size 8",
        "and token counts, float32. Median step in seconds.",
        "",
        "| completions x tokens | TRL | r1kern | ratio | aim | r1kern by phase | generated tok/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        phases = ", ".join(f"{k} {v:.2f}" for k, v in r["r1kern"]["phases_s"].items() if v >= 0.005)
        lines.append(
            f"| {r['completions']} x {r['tokens']} | {r['trl']['step_s']:.2f} | "
            f"{r['r1kern']['step_s']:.2f} | {r['ratio']:.2f} | {r['aim']} | {phases} | "
            f"{r['r1kern']['generated_tok_per_s']:.0f} |"
        )
    (results / "step_vs_trl.md").write_text("\n".join(lines) + "\n")


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
