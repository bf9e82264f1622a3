"""Speculative decoding is lossless, whatever drafts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.compare import (
    PROMPTS,
    assert_same,
    assert_varied,
    engine,
    generate,
    reference_answers,
    run_engine,
    subprocess_answers,
    vllm_answers,
)
from tests.tiny import make_packed, random_model

pytestmark = pytest.mark.slow


def draft(path: Path, tokens: int = 2) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(path), "num_speculative_tokens": tokens}


@pytest.mark.feature("Speculation", "n-gram", against="transformers")
def test_n_grams_do_not_change_the_answers(tmp_path: Path) -> None:
    packed = make_packed("llama", tmp_path)
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    expected = reference_answers(packed, torch.float32)
    assert_varied(expected)
    # In a process of its own: vLLM starts no second engine where it has loaded numba.
    found, _ = subprocess_answers(packed, "float32", {}, speculative_config=config)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.feature(
    "Speculation", "a packed model drafts for a packed one", against="transformers"
)
def test_a_draft_model_does_not_change_the_answers(tmp_path: Path) -> None:
    packed = make_packed("llama", tmp_path / "packed")
    other = make_packed("llama", tmp_path / "draft", seed=1)
    expected = reference_answers(packed, torch.float32)
    assert_varied(expected)
    found = vllm_answers(packed, "float32", speculative_config=draft(other))
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.feature(
    "Speculation", "a dense model with a packed draft", against="the dense model in transformers"
)
def test_a_packed_draft_does_not_change_a_dense_models_answers(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    random_model("llama").save_pretrained(dense)
    twin = make_packed("llama", tmp_path / "twin")
    expected = reference_answers(dense, torch.float32)
    assert_varied(expected)
    found = vllm_answers(dense, "float32", speculative_config=draft(twin))
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.feature(
    "Speculation",
    "a packed model drafts for itself",
    against="all that it drafts is accepted",
)
def test_a_model_accepts_its_own_drafts(tmp_path: Path) -> None:
    packed = make_packed("llama", tmp_path)
    options = {"speculative_config": draft(packed), "disable_log_stats": False}
    with engine(packed, "float32", **options) as llm:
        found = generate(llm, PROMPTS)
        counts = {
            metric.name: metric.value
            for metric in llm.get_metrics()
            if "spec" in metric.name and hasattr(metric, "value")
        }
    assert_same(found, reference_answers(packed, torch.float32), tolerance=2e-3)
    drafted = counts["vllm:spec_decode_num_draft_tokens"]
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0.9 * drafted > 0


@pytest.mark.feature(
    "Speculation",
    "simulated acceptance (`rejection_sample_method: synthetic`)",
    limit="vLLM's rejection sampler asserts on a CPU, for dense pairs too",
)
def test_vllm_simulates_no_acceptance_on_a_cpu(tmp_path: Path) -> None:
    packed, dense = make_packed("llama", tmp_path / "packed"), tmp_path / "dense"
    random_model("llama").save_pretrained(dense)
    for path in (packed, dense):
        config = draft(path) | {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [0.8, 0.64],
        }
        done = run_engine(path, "float32", {}, speculative_config=config)
        assert done.returncode != 0
        assert "Synthetic acceptance not supported with CPU sampling" in done.stdout + done.stderr
