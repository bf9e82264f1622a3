"""Tests on a real GPU; without one, each is skipped.

    python -m pytest tests/gpu -n 8

Neither vLLM nor an installed vllm_bmos is needed: the repository's root on PYTHONPATH is enough.
Most of their time is Triton's compiler, so that processes (pytest-xdist's -n) help.
"""

import pytest
import torch

DEVICE = "cuda"

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
