import pytest

from tests.kernels.triton.poison import poison
from vllm_bmos.kernels.triton import _tokens_to_try, configs, launch

__all__ = ["batch_invariant", "poison", "use_tile"]


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
