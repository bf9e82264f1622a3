"""vLLM holds the packed weights and no unpacked copy of them."""

from pathlib import Path

import pytest

from tests.engine.compare import engine
from tests.tiny import make_packed
from vllm_bmos.checkpoint import Checkpoint
from vllm_bmos.checkpoint.format import REQUIRED
from vllm_bmos.plugin.memory import quantized_bytes


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
