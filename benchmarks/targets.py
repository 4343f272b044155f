"""The targets of the FP8 kernels on an H200: which are met, by the rows of `kernels_<device>.json`.

    python -m r1kern.benchmarks.targets --device h200

Writes `targets_<device>.md`.  DeepGEMM's published figures were measured by its authors on an H800;
they stand in a column of their own.  What was not measured is said to be not measured, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from r1kern.benchmarks import harness
from r1kern.benchmarks.cases_common import Shape, label
from r1kern.benchmarks.cases_fp8 import SWIGLU
from r1kern.benchmarks.cases_fp8_experts import EXPERTS
from r1kern.benchmarks.cases_fp8_gemm import GROUPED, PUBLISHED, PUBLISHED_WGRAD, WGRADS
from r1kern.errors import UserError

Figure = Callable[[dict], float | str]  # of a row, or why there is none


class Target(NamedTuple):
    """At these shapes of a case the figure is to be at least `least`."""

    what: str
    case: str
    shapes: list[Shape]
    figure: Figure
    least: float
    unit: str
    published: str = ""


def rate(row: dict) -> float | str:
    return row["rate"] if row["unit"] == "TFLOP/s" else "is not bound by products"


def of_copy(row: dict) -> float:
    return row["percent_of_measured"]


def times_faster_than(rival: str) -> Figure:
    def figure(row: dict) -> float | str:
        found = row["baselines"].get(rival, {"absent": "not among its rivals"})
        return found.get("times_ours", f"{rival}: {found.get('absent')}")

    return figure


def targets() -> list[Target]:
    """The issue's, in its order."""
    made = []
    for shape, name in zip(GROUPED[:2], ("fc1", "fc2"), strict=True):
        best = PUBLISHED[label(shape)]
        product = f"grouped forward, {name}, 4 x 8192 rows"
        made += [
            Target(product, "fp8_grouped_gemm", [shape], rate, 0.85 * best, "TFLOP/s", str(best)),
            Target(
                f"{product}, CUDA C++", "fp8_gemm_hopper", [shape], rate, best, "TFLOP/s", str(best)
            ),
            Target(
                f"{product}, against DeepGEMM here",
                "fp8_grouped_gemm",
                [shape],
                times_faster_than("deepgemm"),
                1.0,
                "times",
            ),
        ]
    for shape, name in zip(WGRADS[:2], ("fc1", "fc2"), strict=True):
        what = f"wgrad, {name}, 4 x 8192 rows, sizes on the device"
        made.append(Target(what, "fp8_wgrad", [shape], rate, 1050, "TFLOP/s", PUBLISHED_WGRAD))
    for case, what in (("fp8_swiglu", "SwiGLU"), ("fp8_swiglu_backward", "its backward")):
        shapes = SWIGLU.shapes["cuda"]
        copy = "% of the measured copy"
        made.append(Target(f"{what} + both quantised", case, shapes, of_copy, 80, copy))
    balanced = [shape for shape in EXPERTS.shapes["cuda"] if shape["routing"] == "balanced"]
    for rival, what, least in (
        ("torch", "our bf16 path", 1.6),
        ("transformer-engine", "Transformer Engine's blockwise", 1.2),
    ):
        figure = times_faster_than(rival)
        made.append(
            Target(f"expert block, against {what}", "fp8_experts", balanced, figure, least, "times")
        )
    return made


def judge(target: Target, rows: dict[tuple[str, str], dict]) -> list[str]:
    """A line of the table: the worst figure of the target's shapes, and the verdict."""
    figures, missing = [], []
    for shape in target.shapes:
        row = rows.get((target.case, label(shape)))
        if row is None:
            missing.append("no row")
        elif "failed" in row:
            missing.append(f"FAILED: {row['failed']}")
        else:
            figure = target.figure(row)
            (missing if isinstance(figure, str) else figures).append(figure)
    if any(figure < target.least for figure in figures):
        verdict = "NOT MET"
    elif missing:
        verdict = "not measured: " + "; ".join(dict.fromkeys(missing))
    else:
        verdict = "met"
    shown = f"{min(figures):,.4g}" if figures else "-"
    if len(figures) > 1:
        shown += f" (worst of {len(figures)})"
    return [target.what, f"{target.least:,.4g} {target.unit}", shown, verdict, target.published]


def write(source: Path) -> Path:
    """The table of the rows in `source`, printed and written beside it.

    Raises:
        UserError: no such file.
    """
    if not source.exists():
        raise UserError(f"no rows at {source}: run `r1kern bench` first")
    rows = {(row["case"], row["shape"]): row for row in json.loads(source.read_text())}
    head = ["target", "at least", "measured", "verdict", "DeepGEMM, published on H800, TFLOP/s"]
    lines = [head, ["---"] * len(head), *(judge(target, rows) for target in targets())]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    print(text)
    machines = dict.fromkeys(f"- {row['date']}: {row['device']}" for row in rows.values())
    path = source.with_name(source.name.replace("kernels", "targets")).with_suffix(".md")
    path.write_text("\n".join([text, "", *machines, ""]))
    return path


def main(arguments: list[str] | None = None) -> int:
    """Write the table; returns the exit code, 0 whatever the verdicts."""
    parser = argparse.ArgumentParser(description="Which targets of the FP8 kernels are met.")
    parser.add_argument("--device", help="the <device> of kernels_<device>.json; default: this GPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    args = parser.parse_args(arguments)
    device = args.device or harness.slug(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    try:
        write(args.out / f"kernels_{device}.json")
    except UserError as error:
        print(f"r1kern: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
