"""How far the products in blockwise FP8 are from the truth, beside bfloat16's.

Forward, input's and weight's gradient of an expert's two weights at DeepSeek-V3's shapes, scaled
down, against float64 of the operands before they were quantised; error and truth in the root mean
square.  Activations have a few columns a hundred times as large as the rest, gradients are small
and differ row by row, as in training.  On CPU, where sums are float32 throughout; the tensor cores'
sums of 128 are narrower.

    cd benchmarks && python fp8_error.py --json results/fp8_error.json \\
        --markdown results/fp8_error.md
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from r1kern.kernels.fp8_gemm import grouped_gemm, grouped_wgrad
from r1kern.kernels.fp8_quantize import quantize, quantize_weights

SHAPES = {"fc1": (1024, 1792, 2), "fc2": (1792, 512, 1)}
"""N, K and parts: DeepSeek-V3's 2 x 2048 x 7168 and 7168 x 2048, a quarter each way."""

COUNTS = (300, 0, 200, 12)
TITLE = """\
# Error of the products in blockwise FP8

Written by `fp8_error.py`: root mean square error against float64 of what was quantised, over the
root mean square of the truth, in per cent; bf16 is the product of operands rounded to bfloat16.
"""
COLUMNS = {
    "weight": "weight",
    "product": "product",
    "fp32_scales": "FP8, float32 scales, %",
    "power_of_two": "FP8, power-of-two scales, %",
    "bf16": "bf16, %",
    "ratio": "float32 scales over bf16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    found = rows()
    table = markdown(found)
    print(table)
    if args.json:
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    if args.markdown:
        args.markdown.write_text(f"{TITLE}\n{table}\n")


def rows(seed: int = 0) -> list[dict]:
    """A row for every product of every weight; errors are fractions of the truth."""
    found = []
    for weight, (N, K, parts) in SHAPES.items():
        torch.manual_seed(seed)
        x, g, w = operands(N, K)
        truth = products(*(t.double() for t in (x, g)), [t.double() for t in w])
        rounded = products(
            *(t.bfloat16().float() for t in (x, g)), [t.bfloat16().float() for t in w]
        )
        exact, power = (in_fp8(x, g, w, parts, p) for p in (False, True))
        for i, product in enumerate(("forward", "dgrad", "wgrad")):
            errors = [error(t[i], truth[i]) for t in (exact, power, rounded)]
            names = ("fp32_scales", "power_of_two", "bf16")
            found.append(
                {"weight": weight, "product": product} | dict(zip(names, errors, strict=True))
            )
    return found


def operands(N: int, K: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Input [R, K], gradient [R, N], a weight [N, K] for each expert."""
    R = sum(COUNTS)
    x = torch.randn(R, K)
    x[:, torch.randperm(K)[: K // 256]] *= 100
    g = torch.randn(R, N) * torch.randn(R, 1).exp() * 1e-4
    return x, g, [torch.randn(N, K) * 0.006 for _ in COUNTS]


def products(x: Tensor, g: Tensor, w: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Forward [R, N], dgrad [R, K], wgrad [E, N, K] in the dtype of the operands."""
    parts = [(x[i:j], g[i:j], w[e]) for e, (i, j) in enumerate(pairwise(bounds()))]
    return (
        torch.cat([x @ w.t() for x, _, w in parts]),
        torch.cat([g @ w for _, g, w in parts]),
        torch.stack([g.t() @ x for x, g, _ in parts]),
    )


def in_fp8(x: Tensor, g: Tensor, w: list[Tensor], parts: int, power_of_two: bool):
    """`products` by the kernels of training, results in float32."""
    offsets = torch.tensor(bounds())
    codes, codes_t, scales = quantize_weights(w, parts, power_of_two, True)
    *x_rows, x_columns, x_scales = quantize(x, offsets, power_of_two, True, True)
    *g_rows, g_columns, g_scales = quantize(g, offsets, power_of_two, True, True)
    grads = list(torch.zeros(len(w), *w[0].shape).unbind())
    grouped_wgrad(g_columns, g_scales, x_columns, x_scales, offsets, grads)
    return (
        grouped_gemm(*x_rows, codes, scales, offsets, parts, 1, torch.float32),
        grouped_gemm(*g_rows, codes_t, scales.transpose(1, 2), offsets, 1, parts, torch.float32),
        torch.stack(grads),
    )


def bounds() -> list[int]:
    return [0, *torch.tensor(COUNTS).cumsum(0).tolist()]


def error(got: Tensor, truth: Tensor) -> float:
    return ((got - truth).norm() / truth.norm()).item()


def markdown(found: list[dict]) -> str:
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for row in found:
        shown = {k: f"{100 * v:.2f}" if isinstance(v, float) else v for k, v in row.items()}
        shown["ratio"] = f"{row['fp32_scales'] / row['bf16']:.0f}"
        lines.append([shown[column] for column in COLUMNS])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
