"""Draws `roofline_<device>.svg` from the rows of `kernels_<device>.json`.

    python -m r1kern.benchmarks.roofline --device h200

Left, the ops bound by matrix products: TFLOP/s over FLOPs per byte, under the device's limits.
Right, the ops bound by memory: per cent of the copy bandwidth.  Solid lines and bars are the limits
measured in the same run; the dashed line is the datasheet's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from r1kern.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Draw the figure; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the roofline of one device's rows.")
    parser.add_argument("--device", default="cpu", help="the <device> of kernels_<device>.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    args = parser.parse_args(arguments)
    try:
        print(draw(args.out / f"kernels_{args.device}.json", args.out))
    except UserError as error:
        print(f"r1kern: error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(source: Path, folder: Path) -> Path:
    """The SVG's path.

    Raises:
        UserError: no matplotlib, no such file, or no measured row in it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no matplotlib: pip install 'r1kern[bench]'") from None
    if not source.exists():
        raise UserError(f"no rows at {source}: run `r1kern bench` first")
    rows = [row for row in json.loads(source.read_text()) if "us" in row]
    if not rows:
        raise UserError(f"no measured row in {source}: every check failed")
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _products(left, rows)
    _transfers(right, [row for row in rows if row["bound"] == "bytes"])
    figure.suptitle(f"{rows[-1]['device']}, {rows[-1]['date']}")
    target = folder / f"{source.stem.replace('kernels', 'roofline')}.svg"
    figure.savefig(target, metadata={"Date": None})
    return target


def _products(axes, rows: list[dict]) -> None:
    for precision, sample in {row.get("precision", ""): row for row in rows}.items():
        for kind, style in (("measured_limits", "-"), ("datasheet_limits", "--")):
            if kind in sample:
                peak, bandwidth = sample[kind]["flops"], sample[kind]["bytes"]
                ridge = peak / bandwidth
                x = [ridge / 100, ridge, ridge * 1000]
                y = [bandwidth * i / 1e12 for i in x[:2]] + [peak / 1e12]
                name = f"{kind.replace('_', ' ')} {precision}".strip()
                color = "tab:blue" if precision else "black"
                axes.plot(x, y, style, color=color, label=name)
    rows = [row for row in rows if row["bound"] == "flops"]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        intensity = [1e3 * row["gflop"] / row["mbyte"] for row in own]
        axes.plot(intensity, [row["rate"] for row in own], "o", label=case)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    axes.legend()


def _transfers(axes, rows: list[dict]) -> None:
    names = [f"{row['case']}\n{row['shape']}" for row in rows]
    bars = axes.barh(names, [row["percent_of_measured"] for row in rows])
    axes.bar_label(bars, [f"{row['rate']:.4g} GB/s" for row in rows], padding=3)
    axes.set(xlabel="% of the measured copy bandwidth", xlim=(0, 120))
    axes.axvline(100, color="black")
    axes.invert_yaxis()


if __name__ == "__main__":
    sys.exit(main())
