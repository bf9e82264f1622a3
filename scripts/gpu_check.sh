#!/bin/sh
# What only a GPU can show: correctness, speed, and each kernel's time. About three minutes.
# usage: OUT=FOLDER PYTHON=python3 PYTHONPATH=. scripts/gpu_check.sh
# Run it from the repository's root; vLLM and an installed vllm_bmos are not needed. Results go to
# $OUT (benchmarks/results if unset). Nothing stops at a failure; the summary is printed last.
set -u
: "${OUT:=benchmarks/results}" "${PYTHON:=python3}"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=1
mkdir -p "$OUT"
log="$OUT/gpu_check.log"
summary="$OUT/gpu_check.txt"
output=$(mktemp)
trap 'rm -f "$output"' EXIT
: > "$summary" > "$log"

say() { echo "$*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: run it; its output goes to the log, how it ended to the summary.
step() {
    name=$1 limit=$2
    shift 2
    began=$(date +%s)
    timeout -k 5 "$limit" "$@" > "$output" 2>&1
    status=$?
    { echo "===== $name: $*"; cat "$output"; } >> "$log"
    say "== $name: exit $status, $(($(date +%s) - began)) s of $limit"
}

# show LINES PATTERN: the last matching lines of the step before.
show() { grep -E "$2" "$output" | tail -n "$1" | cut -c1-300 | tee -a "$summary"; }

say "$("$PYTHON" -c 'import torch, triton
print("torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name())' 2>&1 | tail -n 2)"

# Most of the tests' time is Triton's compiler: several processes, if pytest-xdist is there.
workers=
"$PYTHON" -c 'import xdist' 2> /dev/null && workers="-n 8"
# shellcheck disable=SC2086
step tests 70 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider --durations=5 $workers
show 25 '^(FAILED|ERROR|E  )|passed|failed|error|skipped'

linear="$PYTHON benchmarks/linear.py --dtype float16 --rounds 3"
step linear 60 $linear --shapes llama-7b --M 1 4 16 64 256 512 2048 \
    --providers vllm_bmos torch marlin --json "$OUT/linear_gpu.json"
show 6 'Error|wrong|failed|missing|limits'
show 20 '^K=|^ +M=|^(vllm_bmos|torch):'
step parts 25 "$PYTHON" benchmarks/gpu_parts.py --json "$OUT/gpu_parts.json"
show 12 "^{'K'|Error"

# Peers that compile or tune for themselves: a run each, so that none takes another's time.
for peer in gemlite humming; do
    step "$peer" 20 $linear --shapes 4096x4096 --M 1 16 256 \
        --providers vllm_bmos torch "$peer" --json "$OUT/linear_gpu_$peer.json"
    rm -f "$OUT/linear_gpu_$peer.png"
    show 3 'Error|wrong|failed|missing'
    show 4 "^ +M=|^($peer|vllm_bmos):"
done

echo "----- summary -----"
cat "$summary"
