"""For a process that was started with TRITON_INTERPRET=1: see ../test_interpreted.py."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture
def poison(monkeypatch):
    """Every new floating-point buffer starts as NaN, as memory of a GPU may."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        buffer = new_empty(self, *args, **kwargs)
        return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
