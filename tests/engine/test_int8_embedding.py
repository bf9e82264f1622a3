"""Embeddings and lm_head in 8 bits, against transformers with the rounded weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.adapters import adapted, make_adapter
from tests.engine.compare import (
    COMPILED,
    PROMPTS,
    TWO_RANKS,
    answers_after_swap,
    assert_same,
    assert_varied,
    engine,
    errors_beside_transformers,
    generate,
    model_answers,
    reference_answers,
    reference_model,
    run_engine,
    save_state,
    subprocess_answers,
    vllm_answers,
)
from tests.tiny import make_packed
from vllm_bmos.plugin.int8_embedding import EMBEDDINGS_ENV, quantize

TABLES = ("embed_tokens.weight", "lm_head.weight")
INT8 = {EMBEDDINGS_ENV: "int8"}
ROW = f"embeddings and lm_head in 8 bits (`{EMBEDDINGS_ENV}=int8`)"
AGAINST = "transformers with the rounded weights"


@pytest.fixture(autouse=True)
def in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMBEDDINGS_ENV, "int8")


def rounded(path: Path, to: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint with the values that are left of its tables after 8 bits."""
    shutil.copytree(path, to)
    tensors = load_file(path / "model.safetensors")
    tables = [name for name in tensors if name.endswith(TABLES)]
    assert tables
    for name in tables:
        codes, scale = quantize(tensors[name].to(dtype))
        assert codes.unique().numel() > 100
        tensors[name] = codes.float() * scale.float().unsqueeze(1)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.feature("Numerics", ROW, against=AGAINST + ", equal tokens")
@pytest.mark.parametrize(
    "arch",
    [
        "llama-tied",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("llama", "gemma3", "phi3")),
    ],
)
def test_fp32_equals_transformers(arch: str, tmp_path: Path) -> None:
    path = make_packed(arch, tmp_path / "packed")
    expected = reference_answers(rounded(path, tmp_path / "rounded"), torch.float32)
    assert_varied(expected)
    with engine(path, "float32") as llm:
        assert_same(generate(llm, PROMPTS), expected, tolerance=2e-3)
        (dtypes,) = llm.apply_model(dtypes_of_tables)
    assert dtypes == {torch.int8}


def dtypes_of_tables(model: torch.nn.Module) -> set[torch.dtype]:
    return {p.dtype for name, p in model.named_parameters() if name.endswith(TABLES)}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_16_bits_are_as_close_to_fp32_as_transformers_is(
    dtype: torch.dtype, packed: Path, tmp_path: Path
) -> None:
    path = rounded(packed, tmp_path / "rounded", dtype)
    answers = vllm_answers(packed, str(dtype).removeprefix("torch."))
    ours, theirs = errors_beside_transformers(path, dtype, answers)
    assert ours.mean() < 1.5 * theirs.mean()


@pytest.mark.slow
@pytest.mark.feature("Parallelism", ROW, against=AGAINST)
def test_compiled_and_on_two_ranks(packed: Path, tmp_path: Path) -> None:
    expected = reference_answers(rounded(packed, tmp_path / "rounded"), torch.float32)
    found, _ = subprocess_answers(packed, "float32", COMPILED | INT8, enforce_eager=False)
    assert_same(found, expected, tolerance=2e-3)
    found, _ = subprocess_answers(packed, "float32", TWO_RANKS | INT8, tensor_parallel_size=2)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature("Adapters", ROW, against=AGAINST + " and the deltas added")
def test_an_adapter(packed: Path, tmp_path: Path) -> None:
    adapter = make_adapter(packed, tmp_path / "adapter")
    model = reference_model(rounded(packed, tmp_path / "rounded"), torch.float32)
    with adapted(model, adapter):
        expected = model_answers(model)
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    found = vllm_answers(packed, "float32", adapter=str(adapter), **options)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Loading", ROW + ", then `reload_weights` of another checkpoint", against=AGAINST
)
@pytest.mark.parametrize("arch", ["llama", "llama-tied"])
def test_a_reload_quantizes_the_new_weights(arch: str, tmp_path: Path) -> None:
    path = make_packed(arch, tmp_path / "served")
    other = make_packed(arch, tmp_path / "other", seed=1)
    found = answers_after_swap(path, other)
    expected = reference_answers(rounded(other, tmp_path / "rounded"), torch.float32)
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Loading",
    ROW + ", a state saved with it or loaded with it",
    against="refused when it is loaded",
)
def test_a_sharded_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, state = make_packed("llama-tied", tmp_path / "packed"), tmp_path / "state"
    state.mkdir()
    save_state(packed, state)
    done = run_engine(state, "float32", INT8, load_format="sharded_state")
    assert done.returncode and f"{EMBEDDINGS_ENV}=int8: --load-format sharded_state" in done.stderr
    monkeypatch.delenv(EMBEDDINGS_ENV)
    with pytest.raises(KeyError, match="weight_scale"):  # vLLM's own message
        vllm_answers(state, "float32", load_format="sharded_state")


@pytest.mark.slow
def test_logits_in_another_dtype_are_refused(packed: Path) -> None:
    done = run_engine(packed, "bfloat16", INT8, hf_overrides={"head_dtype": "float32"})
    assert done.returncode and f"{EMBEDDINGS_ENV}=int8: for logits in another dtype" in done.stderr


@pytest.mark.slow
def test_a_model_whose_tables_vllm_builds_dense_stays_as_it_is(
    tmp_path: Path,
) -> None:
    path = make_packed("opt", tmp_path)
    expected = reference_answers(path, torch.float32)
    found, log = subprocess_answers(path, "float32", INT8)
    assert_same(found, expected, tolerance=2e-3)
    assert f"{EMBEDDINGS_ENV} changes nothing here" in log
