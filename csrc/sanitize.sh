#!/bin/sh
# Build the CPU library with the address and undefined-behaviour sanitizers, and run its tests.
# Usage: csrc/sanitize.sh [PYTHON [PYTEST_ARGUMENTS...]]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
[ $# -eq 0 ] || shift
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

BMOS_CXXFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1" \
    "$python" setup.py --quiet build_ext --build-lib "$build" --build-temp "$build/temp"

# Python itself leaks, by this sanitizer's definition, so leaks are not looked for; a test that
# watches the resident memory looks for ours, and freed memory must not lie around. libstdc++ is
# there from the start, because the sanitizer looks up its exceptions then.
library() { "${CXX:-g++}" -print-file-name="lib$1.so"; }
LD_PRELOAD="$(library asan) $(library ubsan) $(library stdc++)" \
    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8 UBSAN_OPTIONS=print_stacktrace=1 \
    VLLM_BMOS_CPU_LIBRARY="$build/vllm_bmos/kernels/libbmos_cpu.so" \
    "$python" -m pytest -q tests/kernels/test_cpu.py tests/kernels/test_torch_op.py "$@"
