#!/bin/sh
# Installs vllm-bmos for development on a machine without a GPU.
# usage: scripts/setup-cpu.sh VENV_PYTHON TORCH_CPU_INDEX
set -eu
python=$1
torch_index=$2
pip() { "$python" -m pip --disable-pip-version-check -qq "$@"; }
torch=$(grep '^torch==' requirements/cpu.txt)

echo "setup 1/3: $torch"
# A plain `torch` would fetch gigabytes of CUDA, so the CPU build goes first.
pip install "$torch" 2>/dev/null || pip install "$torch" --index-url "$torch_index"

echo "setup 2/3: vLLM for CPU, vllm-bmos and its tools (one to three minutes)"
pip install ./packaging/vllm --editable '.[cpu,convert,dev]' -r requirements/cpu.txt
# vLLM's CPU build requires these, and PyPI has them for another torch only: importing them fails
# and takes transformers down. Text models do not need them.
pip uninstall --yes torchvision torchaudio torchcodec

echo "setup 3/3: check"
"$python" -c 'import torch; assert torch.__version__.endswith("+cpu"), torch.__version__'
"$python" -m vllm_bmos
