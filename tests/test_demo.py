"""The demo's command lines are what the converter takes today, and its layers are whole."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from converters.arguments import COMMANDS, parse
from examples.demo import LAYERS, RECIPES
from vllm_bmos.checkpoint import BinaryMosConfig
from vllm_bmos.checkpoint.format import REQUIRED


@pytest.mark.parametrize("fit", RECIPES)
def test_the_demo_s_recipes(fit: str) -> None:
    line = ["model.gguf", "packed", *RECIPES[fit].flags, "--resume", "--eval-text", "x.txt"]
    args = parse(line, dict.fromkeys(COMMANDS, lambda _: 0))
    assert args.src == Path("model.gguf")


def test_the_shipped_layers_are_whole() -> None:
    with safe_open(LAYERS, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    config = BinaryMosConfig.from_dict(json.loads(metadata["quantization_config"]))
    assert len(config.modules) == 30 * 7
    assert names == {f"{module}.{suffix}" for module in config.modules for suffix in REQUIRED}
