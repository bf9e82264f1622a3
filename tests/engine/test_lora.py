"""LoRA on all seven projections, against transformers with the same delta added to each layer."""

from pathlib import Path

import pytest
import torch
from vllm.lora.request import LoRARequest

from tests.engine.adapters import adapted, make_adapter
from tests.engine.compare import (
    PROMPTS,
    assert_same,
    assert_varied,
    engine,
    generate,
    model_answers,
    reference_model,
    run_engine,
)
from tests.tiny import make_packed, random_model

PROJECTIONS = "LoRA on all seven projections; two adapters and none in one batch"


@pytest.fixture(scope="module")
def adapters(packed: Path) -> list[LoRARequest]:
    """Two adapters of different ranks; both are for q, k, v, o, gate, up and down."""
    paths = [
        make_adapter(packed, packed.parent / "one", rank=8, seed=1),
        make_adapter(packed, packed.parent / "two", rank=4, seed=2),
    ]
    return [LoRARequest(path.name, i, str(path)) for i, path in enumerate(paths, start=1)]


@pytest.mark.feature("Adapters", PROJECTIONS, against="transformers with the deltas added")
def test_two_adapters_and_none_in_one_batch_equal_transformers(
    packed: Path, adapters: list[LoRARequest]
) -> None:
    model = reference_model(packed, torch.float32)
    plain = model_answers(model)
    expected = {"": plain}
    for adapter in adapters:
        with adapted(model, Path(adapter.lora_path)):
            answers = model_answers(model)
        assert_varied(answers)
        assert all(a.tokens != b.tokens for a, b in zip(answers, plain, strict=True))
        expected[adapter.lora_name] = answers

    one, two = adapters
    # On a CPU one slot must stay free for those who want no adapter: see the next test.
    with engine(packed, "float32", enable_lora=True, max_loras=3, max_lora_rank=8) as llm:
        mixed = [one, two, None, one, two, None, two, one]
        found = generate(llm, PROMPTS + PROMPTS, lora_request=mixed)
        for i, (answer, adapter) in enumerate(zip(found, mixed, strict=True)):
            name = adapter.lora_name if adapter else ""
            assert_same([answer], [expected[name][i % len(PROMPTS)]], tolerance=2e-3)
        assert_same(generate(llm, PROMPTS), plain, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.feature(
    "Adapters",
    "requests without an adapter while all `--max-loras` slots are in use",
    limit="on a CPU vLLM answers them with the adapter of the last slot, a dense model's too: "
    "set `--max-loras` to one more than are used",
)
def test_without_a_free_slot_vllm_gives_everybody_an_adapter(
    packed: Path, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    for path in (packed, tmp_path):
        with engine(path, "float32", enable_lora=True, max_loras=1, max_lora_rank=8) as llm:
            before = generate(llm, PROMPTS)
            mixed = [adapters[0], None, adapters[0], None]
            found = generate(llm, PROMPTS, lora_request=mixed)
            assert all(found[i].tokens != before[i].tokens for i in (1, 3))


@pytest.mark.slow
@pytest.mark.feature(
    "Adapters",
    "LoRA with a mixture of experts",
    limit="vLLM's LoRA layer for experts works with its Triton kernels only: it refuses to start, "
    "and a dense mixture fails at the first request on a CPU",
)
def test_vllm_runs_no_mixture_with_lora_on_a_cpu(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    random_model("mixtral").save_pretrained(dense)
    errors = {
        make_packed("mixtral", tmp_path / "packed"): "modular kernel not supported",
        dense: "triton.language",
    }
    for path, error in errors.items():
        done = run_engine(path, "float32", {}, enable_lora=True, max_loras=2, max_lora_rank=8)
        assert done.returncode != 0 and error in done.stderr
