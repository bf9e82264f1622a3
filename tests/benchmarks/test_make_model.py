import random
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import SHAPES, make_bmos_model, make_dense_model, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_bmos.checkpoint.verify import verify


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_bmos_model(directory, replace(SHAPES["tiny"], intermediate_size=350), E=3)
    return directory


def test_checkpoint_is_valid(model: Path):
    checkpoint = verify(model)
    assert checkpoint.config.num_experts == 3
    assert len(checkpoint.shapes) == 2 * 7
    assert checkpoint.shapes["model.layers.1.mlp.down_proj"] == (128, 350)


def test_text_survives_the_tokenizer(model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == SHAPES["tiny"].vocab_size
    text = "Hello <x7> wörld\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Tokens that are not bytes: bytes alone need not be UTF-8.
    tokens = random.choices(range(300, len(tokenizer)), k=200)
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens


def test_vocabulary_without_room_for_the_bytes(tmp_path: Path):
    with pytest.raises(ValueError, match="at least 259"):
        write_tokenizer(tmp_path, 100)


def test_same_seed_same_bytes(model: Path, tmp_path: Path):
    make_bmos_model(tmp_path, replace(SHAPES["tiny"], intermediate_size=350), E=3)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (model / name).read_bytes()


def test_a_dense_model_has_every_weight(tmp_path: Path):
    make_dense_model(tmp_path / "dense", SHAPES["tiny"])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    layer = model.model.layers[1].mlp.down_proj
    assert layer.weight.shape == (128, SHAPES["tiny"].intermediate_size)
    assert 0.9 < layer.weight.square().sum(1).mean() < 1.1  # rows of length 1
