"""A OneBit checkpoint: the LayerNorm that ends its layers, in merged and single layers of vLLM."""

import json
from pathlib import Path

import torch

from converters.hf_to_bmos import main
from tests.converters.models import make_onebit
from tests.engine.compare import assert_same, assert_varied, reference_answers, vllm_answers
from tests.tiny import make_packed


def test_onebit_checkpoint_is_served_with_its_layer_norm(tmp_path: Path) -> None:
    source = make_onebit(tmp_path / "source", packed=True)
    assert main([str(source), str(tmp_path / "packed")]) == 0
    answers = vllm_answers(tmp_path / "packed", "float32")
    expected = reference_answers(tmp_path / "packed", torch.float32)
    assert_varied(expected)
    assert_same(answers, expected, tolerance=2e-3)


def test_a_layer_that_is_fused_on_disk_has_one_norm(tmp_path: Path) -> None:
    path = make_packed("phi3", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["output_norm"] = "layer_norm"
    (path / "config.json").write_text(json.dumps(config))
    answers = vllm_answers(path, "float32")
    expected = reference_answers(path, torch.float32)
    assert_varied(expected)
    assert_same(answers, expected, tolerance=2e-3)
