"""A OneBit checkpoint: the LayerNorm that ends its layers, in merged and single layers of vLLM."""

from pathlib import Path

import torch

from converters.hf_to_bmos import main
from tests.converters.models import make_onebit
from tests.engine.compare import assert_same, assert_varied, reference_answers, vllm_answers


def test_onebit_checkpoint_is_served_with_its_layer_norm(tmp_path: Path) -> None:
    source = make_onebit(tmp_path / "source", packed=True)
    assert main([str(source), str(tmp_path / "packed")]) == 0
    answers = vllm_answers(tmp_path / "packed", "float32")
    expected = reference_answers(tmp_path / "packed", torch.float32)
    assert_varied(expected)
    assert_same(answers, expected, tolerance=2e-3)
