"""What the CUDA C++ kernels of `csrc/hopper` compile to, read from the built library; no GPU.

Prints a table of `r1kern._hopper` (or of the library named); exit code 1 where a kernel spills,
lacks what it is made of, or needs more shared memory than there is.  `--json FILE` and
`--markdown FILE` write the table.

    cd benchmarks && python hopper_resources.py --json results/hopper_resources.json \\
        --markdown results/hopper_resources.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = 227 << 10
"""Bytes a block can have on Hopper."""

KERNELS = {
    "grouped_gemm bf16": r"grouped_gemm_kernelI\w*4Bf16E",
    "grouped_gemm float32": r"grouped_gemm_kernelIfE",
    "grouped_wgrad": r"grouped_wgrad_kernel",
}

COUNTED = {
    "qgmma": r"\bQGMMA\.",
    "waits": r"\bWARPGROUP\.DEPBAR",
    "tma_loads": r"\bUTMALDG\b",
    "setmaxnreg": r"\bUSETMAXREG\b",
    "local": r"\b(?:LDL|STL)\b",
}

COLUMNS = {
    "kernel": "kernel",
    "cuda": "CUDA",
    "registers": "registers a thread at launch",
    "producer": "producer's",
    "consumer": "consumers'",
    "stack": "stack, bytes",
    "local": "LDL and STL (spills)",
    "shared": "shared memory, bytes",
    "qgmma": "QGMMA",
    "waits": "waits for them",
    "tma_loads": "UTMALDG",
    "setmaxnreg": "USETMAXREG",
}

TITLE = """\
# CUDA C++ kernels compiled for sm_90a

Written by `hopper_resources.py`, without a GPU, from the machine code: registers, stack and shared
memory of a thread and a block, the rest counts instructions.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, nargs="?", help="default: r1kern._hopper's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows = table(args.library or _installed())
    print(markdown(rows))
    wrong = [f"{row['kernel']}: {x}" for row in rows for x in faults(row)]
    print("\n".join(wrong), file=sys.stderr)
    if args.json:
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    if args.markdown:
        args.markdown.write_text(f"{TITLE}\n{markdown(rows)}\n")
    return 1 if wrong else 0


def _installed() -> Path:
    spec = find_spec("r1kern._hopper")
    if spec is None:
        sys.exit("r1kern._hopper is not built: run `python setup.py build_ext --inplace` with nvcc")
    return Path(spec.origin)


def table(library: Path) -> list[dict]:
    """A row for every kernel in the library."""
    spec = spec_from_file_location(
        "_hopper", library, loader=ExtensionFileLoader("_hopper", str(library))
    )
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    usage = dict(re.findall(r"Function (\w+):\n(.*)", _cuobjdump("-res-usage", library)))
    code = _cuobjdump("-sass", library)
    sass = {x.split("\n", 1)[0].strip(): x for x in code.split("Function : ")[1:]}
    assert usage.keys() == sass.keys() and len(usage) == len(KERNELS), sorted(usage)
    version = f"{module.CUDA_VERSION // 1000}.{module.CUDA_VERSION % 1000 // 10}"
    rows = []
    for name, pattern in KERNELS.items():
        (symbol,) = (symbol for symbol in usage if re.search(pattern, symbol))
        shared = module.SHARED_MEMORY[name.split()[0]] + _of("SHARED", usage[symbol])
        rows.append({"kernel": name, "cuda": version, "shared": shared})
        rows[-1] |= measure(usage[symbol], sass[symbol])
    return rows


def measure(usage: str, sass: str) -> dict:
    """Registers, bytes and counts of instructions, from what cuobjdump tells of a kernel."""
    row = {name: len(re.findall(pattern, sass)) for name, pattern in COUNTED.items()}
    given = re.findall(r"USETMAXREG\.(\w+)\.CTAPOOL(?: UP\d,)? (0x[0-9a-f]+)", sass)
    roles = {"DEALLOC": "producer", "TRY_ALLOC": "consumer"}
    row |= dict.fromkeys(roles.values(), 0) | {roles[how]: int(n, 16) for how, n in given}
    return row | {"registers": _of("REG", usage), "stack": _of("STACK", usage)}


def faults(row: dict) -> list[str]:
    """What no kernel may have."""
    found = []
    if row["local"] or row["stack"]:
        found.append(f"spills: {row['local']} LDL and STL, stack of {row['stack']}")
    if row["shared"] > SHARED_MEMORY:
        found.append(f"{row['shared']} bytes of shared memory; there are {SHARED_MEMORY}")
    found += [f"no {name}" for name in ("qgmma", "tma_loads", "setmaxnreg") if not row[name]]
    if row["qgmma"] != 4 * row["waits"]:
        found.append(f"{row['waits']} waits for {row['qgmma']} QGMMA, not one for four: serialised")
    if 128 * row["producer"] + 256 * row["consumer"] > 384 * row["registers"]:
        found.append("setmaxnreg asks for more registers than the block was launched with")
    return found


def _of(name: str, usage: str) -> int:
    return int(re.search(rf" {name}:(\d+)", usage)[1])


def _cuobjdump(what: str, library: Path) -> str:
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    command = [BIN / "cuobjdump", what, library]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def markdown(rows: list[dict]) -> str:
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[str(row[column]) for column in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
