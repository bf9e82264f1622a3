import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import analyze_scales  # noqa: E402

from tests.tiny import add_tokenizer, make_packed, random_model  # noqa: E402


def test_static_scales_do_not_move():
    G = torch.rand(10, 3).softmax(dim=-1)
    assert analyze_scales.follow(G, torch.ones(3, 5))["largest"] == pytest.approx(0, abs=1e-6)


def test_deviation_is_relative_to_the_mean_over_tokens():
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = analyze_scales.follow(G, torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert found["largest"] == pytest.approx(0.5) and found["median"] == pytest.approx(0.0)


def test_uniform_gates_have_all_bits_and_hard_gates_none():
    S = torch.ones(4, 5)
    uniform = analyze_scales.describe(torch.full((6, 4), 0.25), S, S)
    assert uniform["entropy_bits"] == pytest.approx(2.0)
    assert uniform["expert_share"] == pytest.approx([0.25] * 4)
    hard = analyze_scales.describe(torch.eye(4), S, S)
    assert hard["entropy_bits"] == pytest.approx(0.0, abs=1e-6)
    assert hard["top_share"] == [0.25] * 4


def run(monkeypatch, tmp_path, *flags):
    text = tmp_path / "text.txt"
    text.write_text("a $quick$ brown fox " * 20)
    out = tmp_path / "out.json"
    arguments = ["analyze_scales.py", str(tmp_path / "model"), "--text", str(text)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(out), "--tokens", "40", *flags])
    return analyze_scales.main(), out


def test_a_packed_model_gives_numbers_and_figures(monkeypatch, tmp_path):
    add_tokenizer(make_packed("llama", tmp_path / "model", E=4))
    layer = "model.layers.1.mlp.up_proj"
    code, out = run(monkeypatch, tmp_path, "--layer", layer)
    assert code == 0
    result = json.loads(out.read_text())
    assert result["tokens"] == 40 and len(result["layers"]) == 14
    row = result["layers"][layer]
    assert 0 < row["entropy_bits"] < 2 and row["in"]["median"] > 0
    assert math.isclose(sum(row["expert_share"]), 1, rel_tol=1e-5)
    for name in ("out_gates.svg", "out_spread.svg", "out_scales.svg"):
        assert "</svg>" in (tmp_path / name).read_text()


def test_bad_use_is_named(monkeypatch, tmp_path):
    random_model("llama").save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    assert run(monkeypatch, tmp_path)[0] == 2
