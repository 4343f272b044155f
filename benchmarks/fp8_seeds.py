"""Does blockwise FP8 train as well?  The demo's cold start and GRPO over seeds, with and without.

For every seed the same model and data are trained in `--dtype` ("baseline"), with
`model.precision=fp8_blockwise model.fp8_linears=true` ("fp8") and, on demand, with the generator's
weights in FP8 besides ("fp8_generator").  Writes `results/fp8_seeds.json`, `.md` and,
where matplotlib is there, `.svg` after every run; a run that is done is only read, one that was
stopped goes on from its last checkpoint.

    python benchmarks/fp8_seeds.py --folder runs/fp8_seeds --sft-steps 400 --grpo-steps 40

"Within noise" is said where the mean difference over the seeds is no larger than what the
differences themselves scatter (Student's t, 95 %) or, for pass@1, than 1.96 standard errors of the
evaluations.  Few seeds see large differences only: the interval stands beside the verdict.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path

from paired import compare
from step_vs_trl import HERE, cpu_model

from r1kern.demo import CONFIGS, write_inputs
from r1kern.launch import launch
from r1kern.report.metrics import read_metrics

PRECISIONS = {
    "baseline": [],
    "fp8": ["model.precision=fp8_blockwise", "model.fp8_linears=true"],
}
PRECISIONS["fp8_generator"] = [*PRECISIONS["fp8"], "generator.fp8=true"]
COMPARED = {
    "sft_loss": "cold start: loss, mean of the last tenth",
    "reward": "GRPO: reward, mean of the last tenth",
    "pass@1": "held-out pass@1 at the end",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8_seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--precisions", nargs="+", choices=[*PRECISIONS], default=["baseline", "fp8"]
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sft-steps", type=int, default=400)
    parser.add_argument("--grpo-steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=min(2, len(os.sched_getaffinity(0))))
    args = parser.parse_args()
    todo = [(seed, name) for seed in args.seeds for name in args.precisions]
    left = [(seed, name) for seed, name in todo if not is_done(args.folder / f"s{seed}", name)]
    print(f"{len(left)} of {len(todo)} runs to do{guess(args, len(left))}", flush=True)
    rows, spent = [], []
    for seed, name in todo:
        folder = args.folder / f"s{seed}"
        if (seed, name) in left:
            started = time.monotonic()
            run(args, folder, seed, name)
            spent.append(time.monotonic() - started)
            remaining = (len(left) - len(spent)) * statistics.mean(spent)
            print(f"{name} of seed {seed}: {spent[-1] / 60:.1f} min; {remaining / 60:.0f} left")
        rows.append({"seed": seed, "precision": name, **read_run(folder / name)})
        write(args, rows)
    print((args.out / "fp8_seeds.md").read_text())


def is_done(folder: Path, name: str) -> bool:
    return (folder / name / "grpo" / "model").is_dir()


def guess(args: argparse.Namespace, runs: int) -> str:
    """Minutes by the seconds of a GRPO step that `demo_seeds.py` measured, where it has."""
    source = HERE / "results" / "demo.json"
    if not source.exists() or not runs:
        return ""
    rows = json.loads(source.read_text())["rows"]
    step = statistics.median(row["step_s"]["step"] for row in rows)
    # An SFT step takes a seventh of a GRPO step; starting, evaluating and FP8 as much again.
    seconds = 2 * runs * step * (args.grpo_steps + args.sft_steps / 7)
    return f", very roughly {seconds / 60:.0f} minutes"


def run(args: argparse.Namespace, folder: Path, seed: int, name: str) -> None:
    """Both stages of one seed in one precision, or the rest of them."""
    if not (folder / "cold_start.jsonl").is_file():
        write_inputs(folder, seed)
    own, common = folder / name, [f"run.seed={seed}", f"model.dtype={args.dtype}"]
    # An SFT run has no generator.
    trained = [option for option in PRECISIONS[name] if option.startswith("model.")]
    sft = [
        *(f"model.path={folder / 'base'}", f"data.train={folder / 'cold_start.jsonl'}"),
        *(f"run.folder={own / 'sft'}", f"train.steps={args.sft_steps}"),
        *(*common, *trained),
    ]
    grpo = [
        *(f"model.path={own / 'sft' / 'model'}", f"run.folder={own / 'grpo'}"),
        # FP8 in the trainer alone moves its log-probs from the generator's: reported, not limited.
        *(f"train.steps={args.grpo_steps}", "train.mismatch_limit=0"),
        *(*common, *PRECISIONS[name]),
    ]
    stages = (("sft", "demo_sft.yaml", sft), ("train", "demo.yaml", grpo))
    for command, config, options in stages:
        if command == "sft" and (own / "sft" / "model").is_dir():
            continue
        code = launch(
            [command, str(CONFIGS / config), *options, "--resume"], processes=args.processes
        )
        if code:
            sys.exit(f"{command} of seed {seed} ({name}) ended with code {code}")


def read_run(folder: Path) -> dict:
    """Curves and ends of both stages, from the run's own records."""
    sft = [r["loss"] for r in read_metrics(folder / "sft") if "loss" in r]
    records = read_metrics(folder / "grpo")
    steps = [r for r in records if "reward" in r]
    evals = [r for r in records if "eval/pass@1" in r]
    mismatch = [r["max_mismatch"] for r in steps]
    return {
        "sft_loss": last_tenth(sft),
        "reward": last_tenth([r["reward"] for r in steps]),
        "pass@1 before": evals[0]["eval/pass@1"],
        "pass@1": evals[-1]["eval/pass@1"],
        "pass@1 error": evals[-1]["eval/half_interval"] / 1.96,  # half of 95 %
        "max_mismatch": max(mismatch),
        "median_mismatch": statistics.median(mismatch),
        "step_s": statistics.median(r["seconds/step"] for r in steps),
        "sft_curve": sft,
        "reward_curve": [r["reward"] for r in steps],
    }


def last_tenth(values: list[float]) -> float:
    return statistics.mean(values[-max(1, len(values) // 10) :])


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    compared = [
        found
        for name in args.precisions
        for figure in COMPARED
        if name != "baseline" and (found := compare(rows, name, figure))
    ]
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "dtype": args.dtype,
        "sft_steps": args.sft_steps,
        "grpo_steps": args.grpo_steps,
        "compared": compared,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fp8_seeds.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "fp8_seeds.md").write_text(markdown(report))
    draw(rows, args.out / "fp8_seeds.svg")


def markdown(report: dict) -> str:
    lines = [
        f"# Blockwise FP8 beside {report['dtype']} ({report['date']}, {report['machine']})",
        "",
        f"Written by `fp8_seeds.py`: the demo's cold start ({report['sft_steps']} steps) and GRPO "
        f"({report['grpo_steps']} steps), experts and linears in FP8.",
        "",
        "| seed | precision | SFT loss | reward | pass@1 before | pass@1 after (1 s.e.) "
        "| mismatch, median / largest | step s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['seed']} | {r['precision']} | {r['sft_loss']:.4f} | {r['reward']:.3f} | "
            f"{r['pass@1 before']:.1%} | {r['pass@1']:.1%} ({r['pass@1 error']:.1%}) | "
            f"{r['median_mismatch']:.1e} / {r['max_mismatch']:.1e} | {r['step_s']:.2f} |"
        )
    lines += ["", "| less the baseline | difference | 95 %, paired | 95 %, evaluation | noise |"]
    lines += ["|---|---|---|---|---|"]
    for c in report["compared"]:
        verdict = "within" if c["within_noise"] else "OUTSIDE"
        lines.append(
            f"| {c['precision']}: {COMPARED[c['figure']]} ({c['seeds']} seeds) | "
            f"{c['difference']:+.4f} | +- {c['paired_half_interval']:.4f} | "
            f"+- {c['evaluation_half_interval']:.4f} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], target: Path) -> None:
    """Both curves of all runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves drawn: pip install 'r1kern[bench]' for matplotlib")
        return
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, curve in zip(figure.subplots(1, 2), ("sft_curve", "reward_curve"), strict=True):
        for row in rows:
            style = {"baseline": "-", "fp8": "--"}.get(row["precision"], ":")
            name = f"{row['precision']}, seed {row['seed']}"
            axes.plot(smooth(row[curve]), style, color=f"C{row['seed']}", label=name)
        axes.set(xlabel="step", ylabel=curve.replace("_curve", "").replace("sft", "SFT loss"))
        axes.legend()
    figure.savefig(target, metadata={"Date": None})


def smooth(values: list[float]) -> list[float]:
    """Means over up to ten steps back."""
    return [statistics.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    main()
