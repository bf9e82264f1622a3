"""Which dtype whole models are fitted in."""

import pytest
import torch

from converters.fitting import precision


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"cpu_name": "of no known kind"}, torch.float32),
    ],
)
def test_bfloat16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "has_gpu", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.model_dtype() == dtype


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_that_emulates_bfloat16_gets_float32(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(precision, "has_gpu", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation
    )
    assert precision.model_dtype() == (torch.bfloat16 if native else torch.float32)
