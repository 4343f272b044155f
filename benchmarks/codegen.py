"""What every Triton kernel compiles to on Hopper, found without a GPU.

Compiles each kernel of `kernels/*_triton.py` for sm_90a in every configuration that can be launched
(the modules' `variants()`) and prints a table; exit code 1 where one spills or needs more shared
memory than there is.  `--json FILE` and `--markdown FILE` write the table; rows that the JSON file
has of other Triton versions stay.

    cd benchmarks && python codegen.py --json results/codegen.json --markdown results/codegen.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (
    "head_triton",
    "route_triton",
    "permute_triton",
    "advantage_triton",
    "objective_triton",
    "fp8_gemm_triton",
    "fp8_quantize_triton",
    "fp8_swiglu_triton",
)
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = 227 << 10
"""Bytes a program can have on Hopper."""

COLUMNS = {
    "kernel": "kernel",
    "configuration": "configuration",
    "triton": "triton",
    "registers": "registers a thread",
    "spill": "spilled, bytes",
    "stack": "stack, bytes",
    "shared": "shared memory, bytes",
    "wgmma": "wgmma",
    "qgmma": "of which FP8",
    "tma_loads": "TMA loads",
    "tma_stores": "TMA stores",
}

TITLE = """\
# Triton kernels compiled for sm_90a

Written by `codegen.py`, without a GPU.  Registers, spills (stores and loads), stack and shared
memory are the machine code's, of a thread and a program; wgmma and TMA count PTX instructions.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows = table()
    print(markdown(rows))
    wrong = [f"{row['kernel']} {row['configuration']}: {x}" for row in rows for x in faults(row)]
    print("\n".join(wrong), file=sys.stderr)
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text())
        rows += [row for row in before if row["triton"] != triton.__version__]
        rows.sort(key=lambda row: row["triton"])
    if args.json:
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    if args.markdown:
        args.markdown.write_text(f"{TITLE}\n{markdown(rows)}\n")
    return 1 if wrong else 0


def table() -> list[dict]:
    """A row for every variant of every module, compiled by the installed Triton."""
    jobs = [(name, i) for name in MODULES for i in range(len(list(_variants(name))))]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(_row, *zip(*jobs, strict=True)))


def faults(row: dict) -> list[str]:
    """What no kernel may have."""
    found = []
    if row["spill"] or row["stack"]:
        found.append(f"spills {row['spill']} bytes, stack of {row['stack']}")
    if row["shared"] > SHARED_MEMORY:
        found.append(f"{row['shared']} bytes of shared memory; there are {SHARED_MEMORY}")
    return found


def _variants(module: str):
    return importlib.import_module(f"r1kern.kernels.{module}").variants()


def _row(module: str, i: int) -> dict:
    configuration, *variant = list(_variants(module))[i]
    name = f"{module.removesuffix('_triton')}.{variant[0].__name__.lstrip('_')}"
    row = {"kernel": name, "configuration": configuration, "triton": triton.__version__}
    return row | measure(*variant)


def measure(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constexprs: dict,
    options: dict,
    aligned: set[str],
) -> dict:
    """Compiles a kernel for sm_90a: registers, bytes of spills and shared memory, instructions."""
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in aligned and name in signature
    }
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        attrs=divisible,
    )
    options = {"enable_fp_fusion": True, **options}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin).stdout
        stack = int(re.search(r" STACK:(\d+)", usage)[1])
        # What spills does so to the stack: without one there is nothing to ask the assembler.
        spill = _spilled(ptx, Path(folder)) if stack else 0
    return {
        "registers": int(re.search(r" REG:(\d+)", usage)[1]),
        "spill": spill,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        "qgmma": len(re.findall(r"\bwgmma\.mma_async\S*\.e4m3\.e4m3\b", ptx)),
        "tma_loads": len(re.findall(r"\bcp\.async\.bulk\.tensor\S*\.shared::\w+\.global", ptx)),
        "tma_stores": len(re.findall(r"\bcp\.async\.bulk\.tensor\S*\.global\.shared", ptx)),
    }


def _spilled(ptx: str, folder: Path) -> int:
    """Bytes spilled, by the wheel's assembler that knows this version of PTX."""
    source = folder / "k.ptx"
    source.write_text(ptx)
    for name in ("ptxas", "ptxas-blackwell"):
        done = _tool(name, "-v", "--gpu-name=sm_90a", source, "-o", folder / "k.o")
        if done.returncode == 0:
            return sum(int(x) for x in re.findall(r"(\d+) bytes spill", done.stderr))
    raise RuntimeError(f"no assembler of Triton {triton.__version__} takes its PTX: {done.stderr}")


def _tool(name: str, *args: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / name, *args], capture_output=True, text=True)


def markdown(rows: list[dict]) -> str:
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[str(row[column]) for column in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
