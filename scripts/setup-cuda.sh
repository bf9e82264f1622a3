#!/bin/sh
# Installs vllm-bmos for development on a machine with an NVIDIA GPU.
# usage: scripts/setup-cuda.sh VENV_PYTHON
set -eu
echo "setup: vllm-bmos with vLLM for CUDA"
"$1" -m pip --disable-pip-version-check -qq install --editable '.[cuda,convert,dev]'
echo "setup: done"
