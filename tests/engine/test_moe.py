"""Mixtures of experts with every feed-forward expert packed, against transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.compare import (
    COMPILED,
    NEW_TOKENS,
    PROMPTS,
    TWO_RANKS,
    Answer,
    assert_equals_transformers,
    assert_same,
    assert_varied,
    engine,
    errors_beside_transformers,
    generate,
    reference_answers,
    subprocess_answers,
    vllm_answers,
)
from tests.tiny import MOE_CONFIGS, MORE_MOE_CONFIGS, make_packed
from vllm_bmos.plugin.versions import unsupported_cpu_moe

OLD_VLLM = unsupported_cpu_moe()
pytestmark = pytest.mark.skipif(OLD_VLLM is not None, reason=str(OLD_VLLM))
Made = dict[str, tuple[Path, list[Answer]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Each architecture as a packed checkpoint, and what transformers answers with it."""
    found = {}
    for arch in MOE_CONFIGS:
        path = make_packed(arch, tmp_path_factory.mktemp(arch) / "packed")
        found[arch] = path, reference_answers(path, torch.float32)
        assert_varied(found[arch][1])
    return found


@pytest.mark.feature(
    "Numerics",
    f"mixtures of experts, eager, float32: {', '.join(MOE_CONFIGS)}",
    against="transformers, equal tokens",
)
@pytest.mark.parametrize("arch", MOE_CONFIGS)
def test_fp32_greedy_tokens_and_logprobs_equal_transformers(arch: str, made: Made) -> None:
    path, expected = made[arch]
    assert_same(vllm_answers(path, "float32"), expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Numerics",
    f"mixtures of experts, eager, float32, once each: {', '.join(MORE_MOE_CONFIGS)}",
    against="transformers, equal tokens",
)
@pytest.mark.parametrize("arch", MORE_MOE_CONFIGS)
def test_more_models_equal_transformers(arch: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_packed(arch, tmp_path))


def make_equal_dense(packed: Path, path: Path) -> Path:
    """The dense model that a packed one with one scaling expert is: by docs/FORMAT.md alone."""
    shutil.copytree(packed, path)
    (path / "bmos_manifest.json").unlink()
    config = json.loads((path / "config.json").read_text())
    modules = config.pop("quantization_config")["modules"]
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    for module in modules:
        a = tensors.pop(f"{module}.out_channel_scale")[0]
        b = tensors.pop(f"{module}.in_channel_scale")[0]
        packed_signs = tensors.pop(f"{module}.weight_packed").numpy()
        bits = np.unpackbits(packed_signs, axis=1, bitorder="little", count=len(b))
        del tensors[f"{module}.router_weight"]
        signs = torch.from_numpy(bits.astype(np.float32) * 2 - 1)
        tensors[f"{module}.weight"] = signs * torch.outer(a, b)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
@pytest.mark.feature(
    "Numerics",
    "mixtures of experts with one scaling expert",
    against="the equal dense model in plain transformers, equal tokens",
)
@pytest.mark.parametrize("arch", MOE_CONFIGS)
def test_one_scaling_expert_equals_a_dense_mixture(arch: str, tmp_path: Path) -> None:
    path = make_packed(arch, tmp_path / "packed", E=1, scale_dtype=torch.float32)
    expected = reference_answers(make_equal_dense(path, tmp_path / "dense"), torch.float32)
    assert_varied(expected)
    assert_same(vllm_answers(path, "float32"), expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Numerics",
    "mixtures of experts, eager, bfloat16",
    against="as close to float32 as transformers is",
)
@pytest.mark.parametrize("arch", MOE_CONFIGS)
def test_bfloat16_is_as_close_to_fp32_as_transformers_is(arch: str, made: Made) -> None:
    path, _ = made[arch]
    found = vllm_answers(path, "bfloat16")
    assert_varied(found)
    error, peer_error = errors_beside_transformers(path, torch.bfloat16, found)
    # Not their largest: where the token router is near a tie, a token goes to another expert.
    assert error.mean() < 1.5 * peer_error.mean() + 0.005


@pytest.mark.slow
@pytest.mark.feature("Numerics", "mixtures of experts, torch.compile", against="transformers")
@pytest.mark.parametrize("arch", MOE_CONFIGS)
def test_compiled_equals_transformers(arch: str, made: Made) -> None:
    path, expected = made[arch]
    found, _ = subprocess_answers(path, "float32", COMPILED, enforce_eager=False)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Parallelism", "mixtures of experts: tensor parallel over 2 ranks", against="transformers"
)
@pytest.mark.parametrize("arch", MOE_CONFIGS)
def test_two_ranks_equal_transformers(arch: str, made: Made) -> None:
    path, expected = made[arch]
    found, _ = subprocess_answers(path, "float32", TWO_RANKS, tensor_parallel_size=2)
    assert_same(found, expected, tolerance=2e-3)


# Five feed-forward experts: three on one rank, two on the other.
@pytest.mark.slow
@pytest.mark.feature(
    "Parallelism",
    "mixtures of experts: `--enable-expert-parallel` over 2 ranks, eager and compiled",
    against="transformers",
)
@pytest.mark.parametrize("compiled", [False, True])
def test_two_ranks_of_experts_equal_transformers(compiled: bool, made: Made) -> None:
    path, expected = made["mixtral"]
    options: dict[str, Any] = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    env = TWO_RANKS | COMPILED if compiled else TWO_RANKS
    found, _ = subprocess_answers(path, "float32", env, enforce_eager=not compiled, **options)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Loading",
    "mixtures of experts: `reload_weights`, `--load-format dummy`",
    against="transformers; of dummy weights, the number of tokens asked for",
)
def test_reloaded_and_dummy_weights(made: Made, tmp_path: Path) -> None:
    path, expected = made["mixtral"]
    with engine(path, "float32") as llm:
        for _ in range(2):
            assert_same(generate(llm, PROMPTS), expected, tolerance=2e-3)
            llm.collective_rpc("reload_weights")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    answers = vllm_answers(tmp_path, "float32", load_format="dummy")
    assert [len(answer.tokens) for answer in answers] == [NEW_TOKENS] * len(PROMPTS)
