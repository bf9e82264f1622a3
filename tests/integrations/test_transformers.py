"""transformers loads packed checkpoints, and its layers compute the definition."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import make_packed, write_packed
from vllm_bmos.checkpoint import Checkpoint, FormatError, unpack_signs
from vllm_bmos.integrations.transformers import BinaryMosLinear


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed("qwen2", tmp_path_factory.mktemp("packed"), E=3)


def load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def test_exactly_the_listed_layers_are_packed(packed: Path) -> None:
    model = load(packed, torch.float32)
    found = {n for n, m in model.named_modules() if isinstance(m, BinaryMosLinear)}
    assert found == set(Checkpoint(packed).config.modules)


def test_a_layer_computes_the_equations_in_float64(packed: Path) -> None:
    name = "model.layers.1.self_attn.k_proj"
    layer = load(packed, torch.float32).get_submodule(name)
    checkpoint = Checkpoint(packed)
    S_in, S_out, R, bias = (
        checkpoint.tensor(f"{name}.{suffix}").double()
        for suffix in ("in_channel_scale", "out_channel_scale", "router_weight", "bias")
    )
    x = torch.randn(2, 5, S_in.shape[1])
    B = unpack_signs(checkpoint.tensor(f"{name}.weight_packed"), S_in.shape[1], torch.float64)
    G = (x.double() @ R.T).softmax(-1)
    y = ((x * (G @ S_in)) @ B.T) * (G @ S_out) + bias
    torch.testing.assert_close(layer(x).double(), y, atol=1e-5, rtol=1e-5)


def test_scales_keep_their_dtype_whatever_the_model_is_loaded_in(packed: Path) -> None:
    layer = load(packed, torch.bfloat16).get_submodule("model.layers.0.mlp.up_proj")
    assert layer.in_channel_scale.dtype == torch.float16
    assert torch.equal(
        layer.in_channel_scale,
        Checkpoint(packed).tensor("model.layers.0.mlp.up_proj.in_channel_scale"),
    )
    assert layer(torch.zeros(1, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_module_that_the_model_does_not_have_is_named(packed: Path, tmp_path: Path) -> None:
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    config["layer_types"] = config["layer_types"][:1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.\S+ is not a linear layer of Qwen2"):
        load(tmp_path, torch.float32)


def test_the_files_that_are_loaded_are_the_files_that_are_checked(
    packed: Path, tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    shutil.copytree(packed, inner)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight_packed.any()
    (inner / "bmos_manifest.json").rename(tmp_path / "bmos_manifest.json")
    with pytest.raises(FormatError, match=r"bmos_manifest\.json is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    (tmp_path / "bmos_manifest.json").rename(inner / "bmos_manifest.json")
    tensors = load_file(inner / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.in_channel_scale"
    save_file({n: t for n, t in tensors.items() if n != name}, inner / "model.safetensors")
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")


@pytest.mark.parametrize("blobs", ["models--a--b/blobs", "blobs/ab"])
def test_a_hub_s_cache_is_loaded(packed: Path, tmp_path: Path, blobs: str) -> None:
    """Its files are links into the model's blobs or, in newer ones, into all models'."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (tmp_path / blobs).mkdir(parents=True)
    for number, name in enumerate(["config.json", "model.safetensors"]):  # no manifest
        blob = tmp_path / blobs / str(number)
        blob.write_bytes((packed / name).read_bytes())
        (snapshot / name).symlink_to(blob)
    model = load(snapshot, torch.float32)
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight_packed.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_runs_in_the_dtype_it_is_loaded_in(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    make_packed("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for name in [name for name in tensors if name.endswith("gate.weight")]:
        tensors[name] = tensors[name].to(other)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    write_packed(tmp_path, tensors, config["modules"], config["num_experts"], torch.float16)
    model = load(tmp_path, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == dtype


def test_an_expert_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    make_packed("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    modules = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    last = modules.pop()
    tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{last}.")}
    write_packed(tmp_path, tensors, modules, 4, torch.float16)
    with pytest.raises(FormatError, match="not every one is listed with gate, up and down"):
        load(tmp_path, torch.float32)
