#!/bin/sh
# Build the CPU library with the address and undefined-behaviour sanitizers and run its tests, then
# with the thread sanitizer and run csrc/race.cpp.
# Usage: csrc/sanitize.sh [PYTHON [PYTEST_ARGUMENTS...]]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
[ $# -eq 0 ] || shift
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# build NAME FLAGS: the library into $build/NAME.
build() {
    BMOS_CXXFLAGS="-O1 -fno-omit-frame-pointer -g1 $2" "$python" setup.py --quiet build_ext \
        --build-lib "$build/$1" --build-temp "$build/$1/temp" 2>"$build/$1.log" || failed=1
    cat "$build/$1.log" >&2
    # An instruction set that does not compile would go unchecked.
    [ -z "${failed:-}" ] && ! grep -q "is left out" "$build/$1.log"
}

# Python is built with -fwrapv, which would make overflow defined and hide it.
build memory "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-wrapv"
# Python itself leaks, by this sanitizer's definition, so leaks are not looked for; a test that
# watches the resident memory looks for ours, and freed memory must not lie around. libstdc++ is
# there from the start, because the sanitizer looks up its exceptions then.
library() { "${CXX:-g++}" -print-file-name="lib$1.so"; }
LD_PRELOAD="$(library asan) $(library ubsan) $(library stdc++)" \
    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8 UBSAN_OPTIONS=print_stacktrace=1 \
    VLLM_BMOS_CPU_LIBRARY="$build/memory/vllm_bmos/kernels/libbmos_cpu.so" \
    "$python" -m pytest -q tests/kernels/test_cpu.py tests/kernels/test_dense.py \
    tests/kernels/test_torch_op.py "$@"

build threads "-fsanitize=thread"
kernels="$build/threads/vllm_bmos/kernels"
# The library takes its threads, and what torch_op.cpp needs, from the process that loads it.
"${CXX:-g++}" -std=c++17 -O1 -g1 -fsanitize=thread -pthread -rdynamic \
    -Wl,--unresolved-symbols=ignore-in-shared-libs -Wl,-rpath,"$kernels" \
    csrc/race.cpp "$kernels/libbmos_cpu.so" -o "$build/race"
# Without random addresses: the sanitizer's own memory has a fixed place. Containers may forbid it.
fixed="setarch $(uname -m) --addr-no-randomize"
$fixed true 2>/dev/null || fixed=
$fixed "$build/race"
