"""Every architecture through vLLM against transformers with the reference op, fp32 and bf16."""

from pathlib import Path

import pytest
import torch

from tests.engine.compare import (
    assert_equals_transformers,
    assert_same,
    assert_varied,
    errors_beside_transformers,
    reference_answers,
    vllm_answers,
)
from tests.tiny import CONFIGS, MORE_CONFIGS, make_packed

# Models that differ from another one of CONFIGS in little.
ALIKE = ("llama-mqa", "mistral", "gemma", "opt-350m")


@pytest.mark.feature(
    "Numerics", f"eager, float32: {', '.join(CONFIGS)}", against="transformers, equal tokens"
)
@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=pytest.mark.slow if arch in ALIKE else ()) for arch in CONFIGS],
)
def test_fp32_greedy_tokens_and_logprobs_equal_transformers(arch: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_packed(arch, tmp_path))


@pytest.mark.feature(
    "Numerics",
    f"eager, float32, once each: {', '.join(MORE_CONFIGS)}",
    against="transformers, equal tokens",
)
@pytest.mark.slow
@pytest.mark.parametrize("arch", MORE_CONFIGS)
def test_many_models_equal_transformers(arch: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_packed(arch, tmp_path, seed=1))


# 16 bits round differently in every engine, so tokens may part. What can be asked is that vLLM's
# log-probabilities are as close to the fp32 truth as those of transformers in the same dtype.
@pytest.mark.feature(
    "Numerics", "eager, bfloat16 and float16", against="as close to float32 as transformers is"
)
@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", "bfloat16"), ("opt", "bfloat16"), ("llama", "float16")]
)
def test_16_bits_are_as_close_to_fp32_as_transformers_is(
    arch: str, dtype: str, tmp_path: Path
) -> None:
    path = make_packed(arch, tmp_path, scale_dtype=getattr(torch, dtype))
    found = vllm_answers(path, dtype)
    assert_varied(found)
    error, peer_error = errors_beside_transformers(path, getattr(torch, dtype), found)
    assert error.mean() < 1.5 * peer_error.mean() + 0.005
    assert error.max() < 2 * peer_error.max() + 0.02


@pytest.mark.feature("Numerics", "1 and 3 experts", against="transformers, equal tokens")
@pytest.mark.parametrize("E", [1, 3])
def test_any_number_of_experts(E: int, tmp_path: Path) -> None:
    path = make_packed("llama", tmp_path, E=E, scale_dtype=torch.float32)
    assert_same(vllm_answers(path, "float32"), reference_answers(path, torch.float32), 2e-3)
