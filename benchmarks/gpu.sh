#!/usr/bin/env bash
# On a machine with a GPU: build, run the tests that need one (tests/test_*_gpu.py; one that skips all
# it has counts as failed), check every op against its reference, then measure everything and say
# which targets are met.
#
# One call starts nothing after SLICE seconds (480) and the next goes on where it stopped; what other
# sources gave is tested, checked and measured again.  Exit code 0: all done; 3: time ran out, call
# it again; anything else: a failure.  Needs torch, triton, pytest, hypothesis, pybind11, a compiler and,
# for the kernels in CUDA C++, nvcc; neither Megatron nor vLLM.  CASES names some cases ("fp8_experts
# fp8_wgrad").  With OUT set, the results are written there as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=benchmarks/results
work=${OUT:-$results}
slice=${SLICE:-480}
python=${PYTHON:-python3}

copy() {
    for file in "$1"/kernels_* "$1"/checks_* "$1"/targets_* "$1"/gpu_tests.txt; do
        [[ ! -e $file || $1 -ef $2 ]] || cp "$file" "$2"
    done
}

tests() {  # each file once for these sources, until the slice is over
    local file done hash failed=0
    hash=$("$python" -c "from r1kern.benchmarks import kernels; print(kernels.source_hash())")
    for file in tests/test_*_gpu.py; do
        if [[ ! -e $file ]]; then continue; fi
        done="$hash $(cat "$file" tests/*_cases.py tests/truth.py | sha256sum | cut -c1-12) $file"
        if grep -qxF "$done" "$work/gpu_tests.txt" 2>/dev/null; then continue; fi
        if ((slice - SECONDS <= 0)); then return 3; fi
        if "$python" -m pytest -q -m "full or not full" "$file"; then
            echo "$done" >>"$work/gpu_tests.txt"
        else
            failed=1
        fi
    done
    return "$failed"
}

suite() {  # until the slice is over
    # shellcheck disable=SC2086
    "$python" -m r1kern.benchmarks.kernels --device cuda --resume \
        --seconds $((slice - SECONDS)) --out "$work" ${CASES:+--case $CASES} "$@"
}

mkdir -p "$work" "$results"
copy "$results" "$work"
"$python" setup.py --quiet build_ext --inplace

code=0
tests || code=$?
if [[ $code != 3 ]]; then
    # Where a test or a check failed the others are measured all the same: each is checked before
    # its row.
    checked=0
    suite --check || checked=$?
    [[ $code != 0 ]] || code=$checked
    if [[ $checked != 3 ]]; then
        measured=0
        suite || measured=$?
        [[ $code != 0 ]] || code=$measured
    fi
fi
if compgen -G "$work/kernels_*.json" >/dev/null; then
    "$python" -m r1kern.benchmarks.targets --out "$work" || true
fi
copy "$work" "$results"
exit "$code"
