"""Opening a packed checkpoint, and everything its headers can get wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.build import LAYERS, E, build, specs, tensors
from vllm_bmos.checkpoint import Checkpoint, FormatError
from vllm_bmos.checkpoint.reader import inside

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def packed(tmp_path):
    return build(tmp_path / "packed")


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_opens(packed):
    checkpoint = Checkpoint(packed)
    assert checkpoint.shapes == LAYERS
    assert checkpoint.config.num_experts == E
    assert checkpoint.specs == specs(tensors())
    assert {extent.file.name for extent in checkpoint.extents.values()} == {"model.safetensors"}
    for name, value in tensors().items():
        assert torch.equal(checkpoint.tensor(name), value)


def test_opens_shards(tmp_path):
    checkpoint = Checkpoint(build(tmp_path / "packed", max_shard_size=64))
    assert len({extent.file for extent in checkpoint.extents.values()}) > 2
    assert all(torch.equal(checkpoint.tensor(name), v) for name, v in tensors().items())


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("container.MAX_HEADER_BYTES", "header claims"),
        ("reader.MAX_JSON_BYTES", "has more than 10 "),
    ],
)
def test_what_is_far_too_large_is_not_read(packed, monkeypatch, limit, message):
    monkeypatch.setattr(f"vllm_bmos.checkpoint.{limit}", 10)
    with pytest.raises(FormatError, match=message):
        Checkpoint(packed)


def test_a_dense_model_is_refused(packed):
    edit(packed / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(FormatError, match="not a packed BinaryMoS checkpoint"):
        Checkpoint(packed)


@pytest.mark.parametrize("file", ["config.json", "bmos_manifest.json", "model.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "empty", "garbage", "list"])
def test_broken_files_are_named(packed, file, fault):
    path = packed / file
    path.unlink()
    if fault != "missing":
        path.write_bytes({"empty": b"", "garbage": b"\x80\x81{", "list": b"[1]"}[fault])
    with pytest.raises(FormatError, match=file):
        Checkpoint(packed)


def test_another_manifest_version(packed):
    edit(packed / "bmos_manifest.json", lambda manifest: manifest.update(format_version=2))
    with pytest.raises(FormatError, match="format_version: expected 1, found 2"):
        Checkpoint(packed)


def test_a_layer_that_config_does_not_list(packed):
    edit(packed / "config.json", lambda c: c["quantization_config"]["modules"].remove(UP))
    with pytest.raises(FormatError, match=f"{UP}.* is not listed in quantization_config.modules"):
        Checkpoint(packed)


def test_a_dense_weight_beside_a_packed_one(tmp_path):
    values = {**tensors(), f"{UP}.weight": torch.ones(5, 11)}
    with pytest.raises(FormatError, match=f"{UP}.weight: .* must not have a dense weight"):
        Checkpoint(build(tmp_path / "packed", values))


def test_a_tensor_in_two_shards(tmp_path):
    packed = build(tmp_path / "packed", max_shard_size=64)
    files = sorted(packed.glob("*.safetensors"))
    merged = load_file(files[0]) | load_file(files[1])
    save_file(merged, files[1])
    with pytest.raises(FormatError, match="is in both"):
        Checkpoint(packed)


def test_index_with_a_missing_entry(tmp_path):
    packed = build(tmp_path / "packed", max_shard_size=64)
    index = packed / "model.safetensors.index.json"
    edit(index, lambda value: value["weight_map"].pop("model.norm.weight"))
    with pytest.raises(FormatError, match=r"model\.norm\.weight: the index places it in no file"):
        Checkpoint(packed)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", ".."]
)
def test_index_that_leads_elsewhere(tmp_path, name):
    packed = build(tmp_path / "packed", max_shard_size=64)
    index = packed / "model.safetensors.index.json"
    edit(index, lambda value: value["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(FormatError, match=r"is not the name of a \.safetensors file"):
        Checkpoint(packed)


def test_links(tmp_path, packed):
    """A link out of the directory is refused, but for a hub cache's links to its blobs."""
    (tmp_path / "secret").write_text("x")
    (packed / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="outside its directory"):
        inside(packed, "out")
    (packed / "within").symlink_to("config.json")
    assert inside(packed, "within") == packed / "within"
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/4567").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    assert inside(snapshot, "config.json").read_text() == "x"
    (snapshot / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="outside its directory"):
        inside(snapshot, "out")
