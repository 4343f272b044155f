#!/usr/bin/env bash
# On a machine with one GPU: the demo's two stages with the real engine, in bfloat16 on CUDA, the
# second a second time with the experts in blockwise FP8.
#
#     benchmarks/gpu_run.sh [FOLDER OF WHEELS]
#
# Without network: bring megatron-core, vllm (a version that takes the installed torch) and what pip
# names as missing; a wheel cut in pieces NAME.whl.part-* is put together again.  Writes the run into
# $OUT (default runs/gpu; grpo and grpo_fp8): metrics.jsonl has every step's seconds by phase, memory,
# power and the trainer/generator mismatch.  A call that was stopped goes on where it was.  Exit
# code 0: both runs reached their end.  Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}

if [[ -n ${1:-} ]]; then
    for first in "$1"/*.whl.part-*a; do
        [[ ! -e $first ]] || cat "${first%a}"* > "${first%.part-*}"
    done
    "$python" -m pip install --quiet --no-deps --no-index "$1"/*.whl
fi
"$python" setup.py --quiet build_ext --inplace
"$python" -m r1kern doctor || echo "doctor found problems (above); going on"

"$python" - "$out" <<'PYTHON'
import sys
from pathlib import Path

from r1kern.data.tiny_model import DEEPSEEK, write_model
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.demo import write_inputs

folder = Path(sys.argv[1])
if not (folder / "cold_start.jsonl").is_file():
    write_inputs(folder, seed=0)
    # On CUDA the FP8 products want experts whose sizes are multiples of 128.
    write_model(folder / "base", DEEPSEEK | dict(moe_intermediate_size=128), build_demo_tokenizer())
PYTHON

train() { "$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m r1kern "$@" --resume; }
train sft configs/demo_sft.yaml model.path="$out/base" data.train="$out/cold_start.jsonl" \
    model.dtype=bfloat16 run.folder="$out/sft"
for precision in dtype fp8_blockwise; do
    name=grpo
    [[ $precision == dtype ]] || name=grpo_fp8
    train train configs/demo.yaml model.path="$out/sft/model" model.dtype=bfloat16 \
        model.precision=$precision train.mismatch_limit=0 generator.kv_cache_gib=8 \
        run.folder="$out/$name"
done
