"""vLLM holds the packed weights and no unpacked copy of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.compare import engine
from tests.tiny import make_packed
from vllm_bmos.checkpoint import Checkpoint
from vllm_bmos.checkpoint.format import REQUIRED


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of every tensor that hangs on a quantized layer, by whatever name."""
    total = 0
    for layer in model.modules():
        if hasattr(layer, "weight_packed"):
            tensors = [
                value
                for holder in (layer._parameters, layer._buffers, vars(layer))
                for value in holder.values()
                if isinstance(value, torch.Tensor)
            ]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            total += sum(storage.nbytes() for storage in storages.values())
    return total


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_resident_weights_are_as_large_as_the_packed_ones(dtype: str, tmp_path: Path) -> None:
    path = make_packed("llama", tmp_path)
    checkpoint = Checkpoint(path)
    packed = sum(
        checkpoint.tensor(f"{module}.{suffix}").nbytes
        for module in checkpoint.config.modules
        for suffix in REQUIRED
    )
    with engine(path, dtype) as llm:
        (resident,) = llm.apply_model(quantized_bytes)
    # A kernel may pad rows and columns of these tiny layers to its tiles, but a bf16 copy of the
    # weights would be several times as large.
    dense = sum(2 * N * K for N, K in checkpoint.shapes.values())
    assert packed <= resident < packed + dense // 8
