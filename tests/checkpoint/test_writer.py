"""The streaming writer."""

import hashlib
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.build import specs, tensors
from vllm_bmos.checkpoint.format import FormatError, TensorSpec
from vllm_bmos.checkpoint.reader import read_headers
from vllm_bmos.checkpoint.writer import CheckpointWriter, plan_shards


def write(path, values, max_shard_size=10_000_000, order=None):
    path.mkdir()
    writer = CheckpointWriter(path, specs(values), max_shard_size)
    for name in order or values:
        writer.write(name, values[name])
    writer.finish()
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_safetensors_library_reads_it(tmp_path):
    values = tensors()
    write(tmp_path / "x", values)
    loaded = load_file(tmp_path / "x/model.safetensors")
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], values[name]) for name in values)


def test_shards_hold_everything_once(tmp_path):
    values = tensors()
    files = write(tmp_path / "x", values, max_shard_size=100)
    index = json.loads(files["model.safetensors.index.json"])
    loaded = {}
    for name in set(index["weight_map"].values()):
        shard = load_file(tmp_path / "x" / name)
        assert not loaded.keys() & shard.keys()
        assert all(index["weight_map"][tensor] == name for tensor in shard)
        loaded |= shard
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], values[name]) for name in values)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    assert read_headers(tmp_path / "x").keys() == values.keys()


def test_plan_shards():
    sizes = {"a": 60, "b": 40, "c": 1, "d": 500, "e": 99}
    shards = plan_shards({name: TensorSpec("U8", (n,)) for name, n in sizes.items()}, 100)
    assert [list(shard) for shard in shards.values()] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert next(iter(shards)) == "model-00001-of-00004.safetensors"


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path):
    values = tensors()
    order = list(values)
    random.Random(3).shuffle(order)
    first = write(tmp_path / "x", values, 100)
    assert first == write(tmp_path / "y", values, 100, order=order)


def test_manifest(tmp_path):
    values = tensors()
    manifest = json.loads(write(tmp_path / "x", values)["bmos_manifest.json"])
    assert manifest["format_version"] == 1 and manifest["tensors"].keys() == values.keys()
    for name, value in values.items():
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert manifest["tensors"][name] == {
            "dtype": specs(values)[name].dtype,
            "shape": list(value.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


@pytest.mark.parametrize("value", [torch.ones(3).half(), torch.ones(4)])
def test_refuses_another_dtype_or_shape_than_planned(tmp_path, value):
    writer = CheckpointWriter(tmp_path, {"a": TensorSpec("F32", (3,))}, 1000)
    with pytest.raises(FormatError, match=r"^a: planned as F32 \[3\]"):
        writer.write("a", value)
    writer.close()


@pytest.mark.parametrize("data", [b"", b"12", b"1234"])
def test_refuses_more_or_fewer_bytes_than_planned(tmp_path, data):
    specs = {"a": TensorSpec("U8", (3,)), "b": TensorSpec("U8", (3,))}
    writer = CheckpointWriter(tmp_path, specs, 1000)
    writer.write_chunks("b", [memoryview(b"xyz")])
    with pytest.raises(FormatError, match=r"^a: planned as"):
        writer.write_chunks("a", [memoryview(data)])
    with pytest.raises(FormatError, match="a was planned but never written"):
        writer.finish()
    writer.close()
    assert (tmp_path / "model.safetensors").read_bytes().endswith(b"xyz")


def test_adopts_only_intact_tensors(tmp_path):
    values = {"a": torch.arange(3.0), "b": torch.arange(4.0)}
    writer = CheckpointWriter(tmp_path, specs(values), 1000)
    sums = {name: writer.write(name, value) for name, value in values.items()}
    writer.close()
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the last byte of b
    file.write_bytes(content)
    again = CheckpointWriter(tmp_path, specs(values), 1000)
    assert again.adopt("a", sums["a"]) and not again.adopt("b", sums["b"])
    assert not again.adopt("c", sums["a"])
    again.write("b", values["b"])
    again.finish()
    assert all(torch.equal(load_file(file)[name], values[name]) for name in values)
