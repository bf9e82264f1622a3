"""The same answers from a compiled model, and from several ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.adapters import adapted, make_adapter
from tests.engine.compare import (
    COMPILED,
    TWO_RANKS,
    assert_same,
    assert_varied,
    model_answers,
    reference_answers,
    reference_model,
    run_engine,
    subprocess_answers,
)
from tests.tiny import make_packed, random_model


@pytest.mark.feature("Numerics", "torch.compile", against="transformers")
def test_compiled_equals_transformers(tmp_path: Path) -> None:
    path = make_packed("llama", tmp_path)
    expected = reference_answers(path, torch.float32)
    assert_varied(expected)
    found, log = subprocess_answers(path, "float32", COMPILED, enforce_eager=False)
    assert re.search(r"compiled graphs: [1-9]", log), log
    assert_same(found, expected, tolerance=2e-3)


# llama-mqa: both ranks hold the one k and v head. opt: biases, which only one rank may add.
# phi3: q/k/v and gate/up are fused on disk and split over the ranks here; with one expert, whose
# gate needs no sum over the ranks.
@pytest.mark.feature("Parallelism", "tensor parallel over 2 ranks", against="transformers")
@pytest.mark.parametrize("arch", ["llama-mqa", "opt", "phi3"])
def test_two_ranks_equal_transformers(arch: str, tmp_path: Path) -> None:
    path = make_packed(arch, tmp_path, E=1 if arch == "phi3" else 4)
    expected = reference_answers(path, torch.float32)
    assert_varied(expected)
    found, _ = subprocess_answers(path, "float32", TWO_RANKS, tensor_parallel_size=2)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Parallelism", "LoRA over 2 ranks", against="transformers with the deltas added"
)
def test_an_adapter_on_two_ranks_equals_transformers(tmp_path: Path) -> None:
    path = make_packed("llama", tmp_path / "packed")
    adapter = make_adapter(path, tmp_path / "adapter")
    model = reference_model(path, torch.float32)
    with adapted(model, adapter):
        expected = model_answers(model)
    assert_varied(expected)
    options: dict[str, Any] = {"tensor_parallel_size": 2, "enable_lora": True, "max_lora_rank": 8}
    found, _ = subprocess_answers(path, "float32", TWO_RANKS, adapter=str(adapter), **options)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature("Parallelism", "pipeline parallel over 2 ranks", against="transformers")
@pytest.mark.parametrize("arch", ["llama", "llama-tied"])
def test_two_stages_equal_transformers(arch: str, tmp_path: Path) -> None:
    path = make_packed(arch, tmp_path)
    expected = reference_answers(path, torch.float32)
    assert_varied(expected)
    found, _ = subprocess_answers(
        path, "float32", COMPILED | TWO_RANKS, pipeline_parallel_size=2, enforce_eager=False
    )
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Parallelism",
    "pipeline parallel with `--enforce-eager`",
    limit="vLLM's CPU worker asserts, for dense models too; works compiled",
)
def test_eager_stages_fail_in_vllm(tmp_path: Path) -> None:
    packed, dense = make_packed("llama", tmp_path / "packed"), tmp_path / "dense"
    random_model("llama").save_pretrained(dense)
    failures = [
        run_engine(path, "float32", TWO_RANKS, pipeline_parallel_size=2) for path in (packed, dense)
    ]
    for failure in failures:
        assert failure.returncode != 0
        assert "AssertionError" in failure.stdout + failure.stderr


@pytest.mark.feature(
    "Parallelism",
    "`--distributed-executor-backend ray`",
    limit="vLLM's CPU platform names no Ray resource, which its executor refuses (no model is run)",
)
def test_vllm_has_no_ray_on_a_cpu() -> None:
    from vllm.platforms.cpu import CpuPlatform

    assert CpuPlatform.ray_device_key == ""  # what its Ray executor refuses
