#!/usr/bin/env bash
# On a machine with a GPU: build, check every op against its reference, then measure everything.
#
# One call starts nothing after SLICE seconds (480) and the next goes on where it stopped; what other
# sources gave is checked and measured again.  Exit code 0: all done; 3: time ran out, call it again;
# anything else: a failure.  Needs torch, triton, pybind11 and a compiler; neither Megatron nor vLLM.
# With OUT set, the results are written there as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=benchmarks/results
work=${OUT:-$results}
slice=${SLICE:-480}
python=${PYTHON:-python3}

copy() {
    for file in "$1"/kernels_* "$1"/checks_*; do
        [[ ! -e $file || $1 -ef $2 ]] || cp "$file" "$2"
    done
}

suite() {  # until the slice is over
    "$python" -m r1kern.benchmarks.kernels --device cuda --resume \
        --seconds $((slice - SECONDS)) --out "$work" "$@"
}

mkdir -p "$work" "$results"
copy "$results" "$work"
"$python" setup.py --quiet build_ext --inplace

code=0
suite --check || code=$?
if [[ $code != 3 ]]; then
    # Where a check failed the others are measured all the same: each is checked before its row.
    measured=0
    suite || measured=$?
    [[ $code != 0 ]] || code=$measured
fi
copy "$work" "$results"
exit "$code"
