"""The verifier: whatever is deleted or flipped, one sentence names the tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.build import LAYERS, build, tensors
from tests.tiny import make_packed
from vllm_bmos.checkpoint import FormatError
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT
from vllm_bmos.checkpoint.verify import verify

NAMES = sorted(tensors())
UP = "model.layers.0.mlp.up_proj"  # K = 11


@pytest.fixture
def packed(tmp_path):
    return build(tmp_path / "packed")


def change_file(packed, change):
    """Change the tensors behind the manifest's back."""
    values = load_file(packed / "model.safetensors")
    change(values)
    save_file(values, packed / "model.safetensors", metadata={"format": "pt"})


def change_manifest(packed, name, change):
    manifest = json.loads((packed / "bmos_manifest.json").read_text())
    if change is None:
        del manifest["tensors"][name]
    else:
        manifest["tensors"][name].update(change)
    (packed / "bmos_manifest.json").write_text(json.dumps(manifest))


def refused(packed, name):
    with pytest.raises(FormatError) as caught:
        verify(packed)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_good_checkpoint_passes(packed):
    seen = []
    assert verify(packed, seen.append).shapes == LAYERS
    assert sorted(seen) == NAMES


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_an_independent_writer_wrote_passes(tmp_path, scale_dtype):
    """tests/tiny.py follows docs/FORMAT.md with numpy and safetensors alone."""
    path = make_packed("qwen2", tmp_path / "packed", scale_dtype=scale_dtype)
    assert len(verify(path).shapes) == 14


@pytest.mark.parametrize("name", NAMES)
def test_deleted_tensor(packed, name):
    change_file(packed, lambda values: values.pop(name))
    refused(packed, name)


@pytest.mark.parametrize("name", NAMES)
def test_tensor_deleted_from_the_manifest(packed, name):
    change_manifest(packed, name, None)
    refused(packed, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != f"{UP}.bias"])
def test_tensor_deleted_from_both(tmp_path, name):
    """Then only the layer's own completeness can tell; a carried tensor is the model's affair."""
    values = tensors()
    del values[name]
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        verify(build(tmp_path / "packed", values))
    else:
        refused(build(tmp_path / "packed", values), name)


@pytest.mark.parametrize("name", NAMES)
def test_flipped_dtype(packed, name):
    """To another dtype of the same size, so that only the dtype differs."""
    other = {
        torch.uint8: torch.int8,
        torch.float16: torch.bfloat16,
        torch.bfloat16: torch.float16,
        torch.float32: torch.int32,
    }
    change_file(packed, lambda v: v.update({name: v[name].view(other[v[name].dtype])}))
    refused(packed, name)


@pytest.mark.parametrize("name", NAMES)
def test_flipped_shape(packed, name):
    def change(values):
        value = values[name]
        values[name] = value.reshape(*value.shape[::-1]) if value.dim() > 1 else value[:, None]
        if values[name].shape == value.shape:  # a square one
            values[name] = value.flatten()

    change_file(packed, change)
    refused(packed, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["dtype", "shape", "sha256"])
def test_flipped_in_the_manifest(packed, name, key):
    change_manifest(packed, name, {key: {"dtype": "F64", "shape": [99], "sha256": "0" * 64}[key]})
    refused(packed, name)


@pytest.mark.parametrize("name", NAMES)
def test_flipped_bit(packed, name):
    def change(values):
        flat = values[name].flatten().view(torch.uint8)
        flat[len(flat) // 2] ^= 1
        values[name] = flat.view(values[name].dtype).view(values[name].shape)

    change_file(packed, change)
    refused(packed, name)


@pytest.mark.parametrize("place", ["config.json", "bmos_manifest.json"])
def test_flipped_version(packed, place):
    value = json.loads((packed / place).read_text())
    owner = value["quantization_config"] if place == "config.json" else value
    owner["format_version"] = 2
    (packed / place).write_text(json.dumps(value))
    refused(packed, "format_version")


@pytest.mark.parametrize("module", LAYERS)
@pytest.mark.parametrize("suffix", [IN_SCALE, OUT_SCALE, ROUTER])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scales_must_be_finite(tmp_path, module, suffix, bad):
    values = tensors()
    values[f"{module}.{suffix}"][1, 2] = bad
    refused(build(tmp_path / "packed", values), f"{module}.{suffix} holds NaN or infinity")


def test_padding_bits_must_be_zero(tmp_path):
    values = tensors()
    values[f"{UP}.{WEIGHT}"][3, 1] |= 0b1000  # weight 11 of row 3; weight 10 is the last
    refused(build(tmp_path / "packed", values), f"{UP}.{WEIGHT}: the padding bits")
