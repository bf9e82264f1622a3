"""One process, no compilation: the fast way to run vLLM in a test. Set before vLLM is imported."""

import os
from collections.abc import Iterator

import pytest

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
