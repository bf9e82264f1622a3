"""Which layers are quantized."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, GraniteMoeHybridConfig

from converters.structure import decoder_linears, meta_model
from tests.tiny import CONFIGS, linear_names
from vllm_bmos.checkpoint.format import FormatError, TensorSpec


def described(config):
    """config.json and the specs of the files of an architecture, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    specs = {name: TensorSpec("F32", tuple(t.shape)) for name, t in model.state_dict().items()}
    return model, json.loads(config.to_json_string(use_diff=False)), specs


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_every_projection_inside_the_blocks(arch):
    model, config, specs = described(CONFIGS[arch]())
    linears = decoder_linears(config, specs)
    outside = {"model.decoder.project_in", "model.decoder.project_out"}  # OPT-350M
    assert set(linears) == set(linear_names(model)) - outside
    for name, shape in linears.items():
        assert tuple(model.get_submodule(name).weight.shape) == shape
    assert not [name for name in linears if "lm_head" in name or "embed" in name]


def test_names_without_the_base_prefix():
    _, config, specs = described(CONFIGS["opt"]())
    short = {name.removeprefix("model."): spec for name, spec in specs.items()}
    assert "decoder.layers.0.fc1" in decoder_linears(config, short)


def test_floats_that_json_does_not_have():
    config = GraniteMoeHybridConfig(num_hidden_layers=1, layer_types=["mamba"])
    values = json.loads(config.to_json_string(use_diff=False))
    assert values["time_step_limit"][1] == {"__float__": "Infinity"}
    for buffers in (False, True):
        assert meta_model(values, 99, buffers).config.time_step_limit[1] == math.inf


def test_layers_that_choose_between_others_stay_dense():
    _, config, specs = described(Gemma3nTextConfig(num_hidden_layers=5, num_kv_shared_layers=0))
    linears = decoder_linears(config, specs)
    assert "model.layers.0.mlp.up_proj" in linears
    assert not [name for name in linears if "altup" in name]
    assert any("altup" in name for name in specs)


def test_a_missing_weight_is_named():
    _, config, specs = described(CONFIGS["llama"]())
    del specs["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        decoder_linears(config, specs)


def test_a_weight_of_another_shape_is_named():
    _, config, specs = described(CONFIGS["llama"]())
    specs["model.layers.1.mlp.up_proj.weight"] = TensorSpec("F32", (8, 8))
    with pytest.raises(FormatError, match=r"up_proj\.weight: config\.json asks for \[160, 128\]"):
        decoder_linears(config, specs)


@pytest.mark.parametrize("model_type", ["no-such-model", None, ["llama"]])
def test_unknown_models(model_type):
    with pytest.raises(FormatError, match="transformers does not know"):
        meta_model({"model_type": model_type}, 10)


@pytest.mark.parametrize("layers", [10**9, "many", None])
def test_a_config_cannot_ask_for_more_blocks_than_there_are_tensors(layers):
    with pytest.raises(FormatError, match="num_hidden_layers"):
        meta_model({"model_type": "llama", "num_hidden_layers": layers}, 100)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_layer": 10**9},
        {"model_type": "bart", "decoder_layers": 10**9},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
    ],
)
def test_blocks_are_counted_whatever_they_are_called(config):
    with pytest.raises(FormatError, match="is 1000000000, but the model has 100 tensors"):
        meta_model(config, 100)


def test_a_config_that_transformers_cannot_build():
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": "wide"}
    with pytest.raises(FormatError, match="transformers cannot build this llama model"):
        meta_model(config, 100)
