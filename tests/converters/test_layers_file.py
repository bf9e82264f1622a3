"""Packed layers alone: what is extracted makes the same checkpoint again, and nothing else."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converters.hf_to_bmos import main
from tests.converters.models import make_dense, make_official, make_onebit
from vllm_bmos.checkpoint.format import WEIGHT
from vllm_bmos.checkpoint.reader import Checkpoint


@pytest.fixture
def extracted(tmp_path):
    """A dense model, a packed one, and the packed one's layers."""
    dense, packed = make_dense(tmp_path / "dense"), tmp_path / "packed"
    assert main([str(dense), str(packed), "--experts", "3", "--scale-dtype", "bfloat16"]) == 0
    file = tmp_path / "layers.safetensors"
    assert main(["extract", str(packed), str(file)]) == 0
    return dense, packed, file


def again(dense, file, *flags):
    target = dense.parent / "again"
    return target, main([str(dense), str(target), "--layers", str(file), *flags])


def test_the_layers_and_their_model_make_the_same_checkpoint(extracted):
    dense, packed, file = extracted
    target, code = again(dense, file)
    assert code == 0
    whole, copy = Checkpoint(packed), Checkpoint(target)
    assert copy.specs == whole.specs
    assert all(torch.equal(copy.tensor(name), whole.tensor(name)) for name in whole.specs)
    config = copy.config
    assert config.num_experts == 3 and config.scale_dtype == "bfloat16"
    assert config.provenance["layers"]["name"] == file.name
    assert config.provenance["stage"] == whole.config.provenance["stage"]


def test_the_file_has_the_packed_layers_and_no_others(extracted):
    _, packed, file = extracted
    names = load_file(file).keys()
    assert {name.rpartition(".")[0] for name in names} == set(Checkpoint(packed).config.modules)


def test_layers_with_a_norm_are_not_extracted(tmp_path, capsys):
    source, packed = make_onebit(tmp_path / "source", packed=True), tmp_path / "packed"
    assert main([str(source), str(packed)]) == 0
    assert main(["extract", str(packed), str(tmp_path / "layers.safetensors")]) == 1
    assert "cannot be extracted" in capsys.readouterr().err


def test_nothing_is_overwritten(extracted, capsys):
    _, packed, _ = extracted
    weights = packed / "model.safetensors"
    before = weights.read_bytes()
    assert main(["extract", str(packed), str(weights)]) == 3
    assert "model.safetensors exists already" in capsys.readouterr().err
    assert weights.read_bytes() == before


def damaged(file, change):
    tensors = load_file(file)
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def with_ignore(_, metadata):
    config = json.loads(metadata["quantization_config"])
    metadata["quantization_config"] = json.dumps({**config, "ignore": ["("]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop(min(n for n in t if n.endswith(WEIGHT))), "found none"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "extra: expected no such tensor"),
        (lambda t, m: m.clear(), "its metadata has no quantization_config"),
        (lambda t, m: m.update(quantization_config="{"), "is not JSON"),
        (with_ignore, "ignore: '(' is not a regular expression"),
    ],
)
def test_a_damaged_file_is_named(extracted, capsys, change, message):
    dense, _, file = extracted
    damaged(file, change)
    target, code = again(dense, file)
    printed = capsys.readouterr().err
    assert code == 1 and message in printed
    assert file.name in printed or "ignore" in message
    assert not target.exists()


def test_layers_of_another_model_are_refused(extracted, capsys):
    dense, _, file = extracted
    other = make_dense(dense.parent / "other", "llama-mqa")
    target, code = again(other, file)
    assert code == 1 and "It is of another model or damaged" in capsys.readouterr().err
    assert not target.exists()


def test_layers_and_a_fit_exclude_each_other(extracted, capsys):
    dense, _, file = extracted
    with pytest.raises(SystemExit):
        again(dense, file, "--stage", "qat")
    assert "--layers: nothing is fitted" in capsys.readouterr().err


def test_binary_sources_have_layers_already(extracted, capsys):
    _, packed, file = extracted
    official = make_official(packed.parent / "official")
    for source, message in ((packed, "packed"), (official, "is binary already")):
        code = main([str(source), str(packed.parent / "again"), "--layers", str(file)])
        printed = capsys.readouterr().err
        assert code == 1 and str(source) in printed and message in printed
