import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Every new floating-point buffer starts as NaN, as memory of a GPU may."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        buffer = new_empty(self, *args, **kwargs)
        return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
