"""One process, no compilation: the fast way to run vLLM in a test. Set before vLLM is imported."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch reads the environment that is set here
    from tests.engine.compare import Answer

ENVIRONMENT = dict(os.environ)

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="package", autouse=True)
def restored_environment() -> Iterator[None]:
    """Later tests start processes of their own, which must not inherit this, nor what vLLM adds."""
    yield
    for name in os.environ.keys() - ENVIRONMENT.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a packed checkpoint."""
    from tests.tiny import make_packed

    return make_packed("llama", tmp_path_factory.mktemp("module") / "packed")


@pytest.fixture(scope="module")
def expected(packed: Path) -> "list[Answer]":
    """What transformers answers with it in float32."""
    import torch

    from tests.engine.compare import assert_varied, reference_answers

    answers = reference_answers(packed, torch.float32)
    assert_varied(answers)
    return answers
