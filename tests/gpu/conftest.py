import pytest
import torch

from vllm_bmos.kernels.triton import _tokens_to_try, configs, launch


@pytest.fixture
def poison(monkeypatch):
    """Every new floating-point buffer starts as NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        buffer = new_empty(self, *args, **kwargs)
        return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def use_tile(monkeypatch):
    """Serve every M with one tile (None: with the vendor GEMM)."""

    def use(tile):
        monkeypatch.setattr(launch, "tile_for", lambda arch, M: tile)

    return use


@pytest.fixture
def batch_invariant(monkeypatch):
    """As in a process that was started with VLLM_BATCH_INVARIANT=1."""
    cached = configs.batch_invariant, configs.tiles_for, _tokens_to_try
    monkeypatch.setenv(configs.BATCH_INVARIANT_ENV, "1")
    for function in cached:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()
