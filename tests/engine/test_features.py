"""What vLLM's users do with a model, against the transformers reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.compare import (
    NEW_TOKENS,
    PROMPTS,
    Answer,
    assert_same,
    assert_varied,
    engine,
    generate,
    reference_answers,
    vllm_answers,
)
from tests.tiny import make_packed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed("llama", tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[Answer]:
    answers = reference_answers(packed, torch.float32)
    assert_varied(answers)
    return answers


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_batched_tokens": 16, "max_num_seqs": 4}, id="chunked-prefill"),
        pytest.param({"max_num_seqs": 2}, id="more-requests-than-slots"),
        pytest.param(
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_max": 3,
                }
            },
            id="n-gram-speculation",
        ),
    ],
)
def test_options_do_not_change_the_answers(
    packed: Path, expected: list[Answer], options: dict[str, Any]
) -> None:
    assert_same(vllm_answers(packed, "float32", **options), expected, tolerance=2e-3)


def test_a_draft_model_does_not_change_the_answers(
    packed: Path, expected: list[Answer], tmp_path: Path
) -> None:
    draft = make_packed("llama", tmp_path, seed=1)
    options = {
        "speculative_config": {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": 2,
        }
    }
    assert_same(vllm_answers(packed, "float32", **options), expected, tolerance=2e-3)


def test_prefix_caching_does_not_change_the_answers(packed: Path) -> None:
    shared = [(7 * i + 3) % 500 + 3 for i in range(160)]
    prompts = [[*shared, 5], [*shared, 9]]

    answers = {}
    for caching in (True, False):
        options = {"enable_prefix_caching": caching, "block_size": 32, "max_model_len": 256}
        with engine(packed, "float32", **options) as llm:
            one_by_one = [generate(llm, [prompt])[0] for prompt in prompts]
            answers[caching] = one_by_one + generate(llm, prompts)
    assert_same(answers[True], answers[False], tolerance=2e-3)


def test_reloaded_weights_give_the_same_answers(packed: Path, expected: list[Answer]) -> None:
    with engine(packed, "float32") as llm:
        generate(llm, PROMPTS[:1])
        llm.collective_rpc("reload_weights")
        assert_same(generate(llm, PROMPTS), expected, tolerance=2e-3)


def test_dummy_weights_need_no_checkpoint(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    answers = vllm_answers(tmp_path, "float32", load_format="dummy")
    assert [len(answer.tokens) for answer in answers] == [NEW_TOKENS] * len(PROMPTS)
