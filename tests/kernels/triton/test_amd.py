"""What compiles for an AMD GPU: a statement of docs/KERNELS.md. Nothing was run on one."""

import os
import re
from dataclasses import replace

import pytest
import torch
from triton.backends.compiler import GPUTarget

from vllm_bmos.kernels.triton import aot, configs, launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="compiling needs a process without it"
    ),
]

GFX942 = GPUTarget("hip", "gfx942", 64)
LDS_BYTES = 64 << 10
MFMA_TOKENS = 16  # fewer columns than this are not multiplied by matrix instructions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_stages_fit_gfx942(monkeypatch, dtype):
    """The table's tiles with a pipeline of two stages, from 16 tokens on, and the vendor path."""
    monkeypatch.setattr(launch, "_inline_asm", lambda: False)
    table = [tile for tile in configs.table()["default"] if tile.BM >= MFMA_TOKENS]
    for tile in (*(replace(tile, stages=2) for tile in table), None):
        monkeypatch.setattr(launch, "tile_for", lambda arch, M, tile=tile: tile)
        M = tile.M if tile else 1000
        for recorded in aot.layer_launches(80, M, 4096, (4096, 1024), 4, dtype, dtype, biased=True):
            recorded.options.pop("maxnreg", None)
            compiled = aot.compile_launch(recorded, GFX942)
            code = compiled.asm["amdgcn"]
            spills = map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code))
            assert not any(spills), (tile, recorded.name)
            assert compiled.metadata.shared <= LDS_BYTES, (tile, recorded.name)
            assert ("v_mfma" in code) == (recorded.name == "gemm"), (tile, recorded.name)
