"""The same answers from a compiled model and from two tensor-parallel ranks."""

from pathlib import Path

import pytest
import torch

from tests.engine.compare import assert_same, assert_varied, reference_answers, subprocess_answers
from tests.tiny import make_packed

COMPILED = {"TORCH_COMPILE_DISABLE": "0"}
TWO_RANKS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # Without a core for each rank, two spinning ranks starve one another.
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
}


def test_compiled_equals_transformers(tmp_path: Path) -> None:
    path = make_packed("llama", tmp_path)
    expected = reference_answers(path, torch.float32)
    assert_varied(expected)
    found, _ = subprocess_answers(path, "float32", COMPILED, enforce_eager=False)
    assert_same(found, expected, tolerance=2e-3)


# llama-mqa: both ranks hold the one k and v head. opt: biases, which only one rank may add.
# phi3: q/k/v and gate/up are fused on disk and split over the ranks here.
@pytest.mark.parametrize("arch", ["llama-mqa", "opt", "phi3"])
def test_two_ranks_equal_transformers(arch: str, tmp_path: Path) -> None:
    path = make_packed(arch, tmp_path)
    expected = reference_answers(path, torch.float32)
    assert_varied(expected)
    found, _ = subprocess_answers(path, "float32", TWO_RANKS, tensor_parallel_size=2)
    assert_same(found, expected, tolerance=2e-3)
