"""A baseline's model: a dense directory, the same whether or not it was interrupted."""

import json
import sys

import pytest
import quantize
import torch
from baselines import gptq, sequential
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from converters.options import Options
from converters.plan import make_plan
from tests.tiny import add_tokenizer, linear_names, random_model

TOKENS = torch.arange(256).view(4, 64) % 250 + 3


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    random_model("llama").save_pretrained(path)
    add_tokenizer(path)
    return path


def tensors_of(path):
    """All tensors of a directory."""
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def run(monkeypatch, method, dense, out, *flags):
    text = out.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again.\n" * 200)
    arguments = ["quantize.py", method, str(dense), str(out), "--calibration", str(text)]
    arguments += ["--windows", "4", "--length", "64", *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    return quantize.main()


@pytest.mark.parametrize("method", quantize.BY_LAYER)
def test_only_the_blocks_linear_layers_change(method, dense, tmp_path, monkeypatch):
    assert run(monkeypatch, method, dense, tmp_path / "out") == 0
    before, after = tensors_of(dense), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    linears = {f"{name}.weight" for name in linear_names(random_model("llama"))}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == linears
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(TOKENS[:1]).logits).all()
    report = json.loads((tmp_path / "out" / quantize.REPORT).read_text())
    assert report["method"] == method and report["tokens"] == 256
    assert 1 <= report["published_bits"] <= report["bits"] < 5
    assert report["calibration"]["texts"][0]["name"] == "text.txt"


def test_float16_is_the_source(dense, tmp_path, monkeypatch):
    assert run(monkeypatch, "float16", dense, tmp_path / "out") == 0
    before, after = map(tensors_of, (dense, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / quantize.REPORT).read_text())["bits"] == 16


def test_an_interrupted_run_gives_the_same_model(dense, tmp_path):
    source = make_plan(dense, Options()).source
    sequential.quantize_model(source, TOKENS, gptq.quantize, tmp_path / "whole", {"a": 1})
    calls = 0

    def breaks_down(W, H):
        nonlocal calls
        calls += 1
        if calls > 9:  # in the second block
            raise KeyboardInterrupt
        return gptq.quantize(W, H)

    target = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        sequential.quantize_model(source, TOKENS, breaks_down, target, {"a": 1}, threads=1)
    assert not target.exists()
    calls = -1000
    sequential.quantize_model(source, TOKENS, breaks_down, target, {"a": 1}, threads=1)
    assert calls == -1000 + 7  # the first block was not done again
    whole, broken = (tensors_of(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not (tmp_path / "broken.fit").exists()


def test_the_second_moment_is_of_the_quantized_models_inputs(dense, tmp_path):
    """Zeroing the first block's layers must change what the second block's are fitted to."""
    source = make_plan(dense, Options()).source
    seen = {"kept": [], "zeroed": []}

    def keep(W, H):
        seen["kept"].append(H.clone())
        return sequential.Quantized(W, 1, 1)

    def zero(W, H):
        seen["zeroed"].append(H.clone())
        return sequential.Quantized(torch.zeros_like(W), 1, 1)

    for name, method in (("kept", keep), ("zeroed", zero)):
        sequential.quantize_model(source, TOKENS, method, tmp_path / name, {}, threads=1)
    kept, zeroed = seen["kept"], seen["zeroed"]
    assert len(kept) == 14
    assert torch.equal(kept[0], zeroed[0])  # the first layer's inputs come from the embeddings
    assert not torch.allclose(kept[3], zeroed[3])  # o_proj's inputs from its block's v_proj
    assert not torch.allclose(kept[7], zeroed[7])
    assert zeroed[3].abs().max() == 0


def test_bad_use_is_named(dense, tmp_path, monkeypatch, caplog):
    assert run(monkeypatch, "gptq", dense, tmp_path / "out", "--length", "100000") == 1
    assert "--length" in caplog.text


@pytest.mark.slow
def test_omniquants_class_learns(dense, tmp_path, monkeypatch):
    """auto-round's training brings the logits closer to the dense model's than its start does."""
    pytest.importorskip("auto_round", reason="pip install 'vllm-bmos[eval]'")
    reference = AutoModelForCausalLM.from_pretrained(dense)
    tokens = torch.tensor([list(b"the quick brown fox jumps over the lazy dog, again")]) + 3

    def distance(steps):
        out = tmp_path / f"steps{steps}"
        assert run(monkeypatch, "omniquant", dense, out, "--steps", str(steps), "--batch", "2") == 0
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(out)
            return float((model(tokens).logits - reference(tokens).logits).square().mean())

    assert distance(60) < 0.95 * distance(1)
    weights = tensors_of(tmp_path / "steps60")
    W = weights["model.layers.0.mlp.gate_proj.weight"]
    assert max(len(row.unique()) for row in W[:, :128]) <= 4
