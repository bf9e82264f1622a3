"""What the plugin claims, and what it refuses before any weight is read."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.models.utils import WeightsMapper

from tests.tiny import make_packed
from vllm_bmos.checkpoint import BinaryMosConfig, FormatError
from vllm_bmos.plugin import config as plugin_config
from vllm_bmos.plugin.config import BinaryMosVllmConfig
from vllm_bmos.plugin.linear import BinaryMosLinearMethod
from vllm_bmos.plugin.versions import refusing_config, unsupported_cpu_moe, unsupported_vllm

QKV_PROJ = "self_attn.qkv_proj"
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed("qwen2", tmp_path_factory.mktemp("packed"))


def vllm_config(*modules: str) -> BinaryMosVllmConfig:
    config = BinaryMosVllmConfig(BinaryMosConfig(4, modules))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def linear() -> LinearBase:
    layer = LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(layer)
    return layer


def test_a_merged_layer_is_claimed_whole() -> None:
    config = vllm_config(*QKV)
    method = config.get_quant_method(linear(), "self_attn.qkv_proj")
    assert isinstance(method, BinaryMosLinearMethod)
    assert method.names == QKV
    assert isinstance(
        config.get_quant_method(linear(), "self_attn.o_proj"), UnquantizedLinearMethod
    )


def test_a_partly_quantized_merged_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"self_attn.k_proj is not quantized while the rest is"):
        vllm_config(QKV[0], QKV[2]).get_quant_method(linear(), "self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("merged", "names"), [("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]), (QKV_PROJ, QKV)]
)
def test_usual_merges_that_the_model_did_not_announce_are_one_layer(
    merged: str, names: list[str]
) -> None:
    config = BinaryMosVllmConfig(BinaryMosConfig(4, tuple(names)))
    method = config.get_quant_method(linear(), merged)
    assert isinstance(method, BinaryMosLinearMethod)
    assert method.names == names


def test_layers_of_a_base_model_are_found_under_the_prefix_that_vllm_adds() -> None:
    config = vllm_config("layers.0.fc1")
    method = config.get_quant_method(linear(), "model.layers.0.fc1")
    assert isinstance(method, BinaryMosLinearMethod) and method.names == ["layers.0.fc1"]
    whole = vllm_config("model.layers.0.fc1", "layers.0.fc2")
    assert isinstance(
        whole.get_quant_method(linear(), "model.layers.0.fc2"), UnquantizedLinearMethod
    )


def test_layers_of_hybrids_are_found_under_the_name_that_vllm_gives_them() -> None:
    config = vllm_config("model.layers.0.mamba.in_proj")
    method = config.get_quant_method(linear(), "model.layers.0.mixer.in_proj")
    assert isinstance(method, BinaryMosLinearMethod)
    assert method.names == ["model.layers.0.mamba.in_proj"]
    own = vllm_config("model.layers.0.mixer.in_proj")
    method = own.get_quant_method(linear(), "model.layers.0.mixer.in_proj")
    assert isinstance(method, BinaryMosLinearMethod)


def test_layers_without_a_place_in_the_model_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    config = vllm_config("layers.0.x_proj", "layers.1.x_proj", "layers.0.fc1")
    config.get_quant_method(linear(), "layers.0.fc1")
    monkeypatch.setattr(
        plugin_config,
        "get_current_vllm_config_or_none",
        lambda: SimpleNamespace(parallel_config=parallel),
    )
    said: list[str] = []
    monkeypatch.setattr(
        plugin_config.logger, "warning_once", lambda text, *parts: said.append(text % parts)
    )
    assert isinstance(config.get_cache_scale_mapper(), WeightsMapper)
    assert re.search(r"2 .* first is layers\.0\.x_proj.* --ignore '\\\.\(x_proj\)\$'", said.pop())
    parallel.pipeline_parallel_size = 2  # a stage has a part of the layers
    config.get_cache_scale_mapper()
    assert not said


def test_a_layer_that_vllm_transforms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_b_proj: vLLM folds .* --ignore 'kv_b_proj'"):
        vllm_config("self_attn.kv_b_proj").get_quant_method(linear(), "self_attn.kv_b_proj")
    method = BinaryMosVllmConfig(BinaryMosConfig(1, ("kv_b_proj",)))
    assert isinstance(method.get_quant_method(linear(), "kv_b_proj"), BinaryMosLinearMethod)


def test_a_dense_model_is_not_served_as_a_packed_one() -> None:
    with pytest.raises(FormatError, match=r"--quantization binarymos: .* not a packed checkpoint"):
        BinaryMosVllmConfig()


def test_parts_that_cannot_be_told_apart_are_refused() -> None:
    names = ["in_proj_qkv", "in_proj_z"]
    method = BinaryMosLinearMethod(BinaryMosConfig(1, tuple(names)), names, None, complete=False)
    with pytest.raises(
        ValueError, match=r"one layer of 4 parts.*'\\.\(in_proj_qkv\|in_proj_z\)\$'"
    ):
        method.create_weights(linear(), 64, [8, 8, 8, 8], 64, 32, torch.float32)


def test_a_folder_without_weights_has_no_inventory_to_check(packed: Path, tmp_path: Path) -> None:
    """What vLLM makes of a checkpoint in an object store: its JSON files."""
    for name in ("config.json", "bmos_manifest.json"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors"}}'
    )
    (tmp_path / "model-rank-0-part-0.safetensors").write_bytes(b"of a sharded state")
    config, _ = read(packed)
    config.biases = None
    config.maybe_update_config(str(tmp_path))
    assert config.biases is None
    (tmp_path / "one.safetensors").write_bytes(b"a shard")
    with pytest.raises(FormatError, match=r"one\.safetensors"):
        config.maybe_update_config(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["one.safetensors"]}')
    with pytest.raises(FormatError, match="weight_map is not an object"):
        config.maybe_update_config(str(tmp_path))


def test_a_checkpoint_on_the_hub_is_checked_before_it_is_loaded(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(name: str, revision: str, cache_dir: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, cache_dir))
        names = [file.name for file in packed.iterdir()]
        needed = {"config.json", "bmos_manifest.json", "model.safetensors"}
        found = {n for n in names if any(Path(n).match(pattern) for pattern in allow_patterns)}
        assert needed <= found and any(
            Path("model.safetensors.index.json").match(pattern) for pattern in allow_patterns
        )
        return str(packed)

    def vllm(load_format: str, weights: str = "") -> SimpleNamespace:
        model = SimpleNamespace(model="user/m", revision="v1", model_weights=weights, use_mla=False)
        load = SimpleNamespace(load_format=load_format, download_dir="cache")
        return SimpleNamespace(model_config=model, load_config=load, lora_config=None)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    name = read(packed)[0].config.modules[0]

    def served(given: SimpleNamespace) -> tuple[BinaryMosVllmConfig, BinaryMosLinearMethod]:
        monkeypatch.setattr(plugin_config, "get_current_vllm_config_or_none", lambda: given)
        monkeypatch.setattr(plugin_config, "check_memory", lambda *_: None)
        config = BinaryMosVllmConfig(read(packed)[0].config)
        monkeypatch.setattr(config, "_check_machine", lambda: None)
        method = config.get_quant_method(linear(), name)
        assert isinstance(method, BinaryMosLinearMethod)
        return config, method

    config, method = served(vllm("auto"))
    assert asked == [("user/m", "v1", "cache")]
    assert config.biases is not None and method.complete and method.biases is not None
    config, method = served(vllm("runai_streamer", weights="s3://bucket/m"))
    assert len(asked) == 1 and config.biases is None and method.complete  # no tensor may be missing
    config, method = served(vllm("dummy"))
    assert len(asked) == 1 and not method.complete
    other = BinaryMosVllmConfig(BinaryMosConfig(2, (name,)))
    monkeypatch.setattr(
        plugin_config, "get_current_vllm_config_or_none", lambda: vllm("safetensors")
    )
    with pytest.raises(FormatError, match="differs from the one vLLM was given"):
        other.get_quant_method(linear(), name)


def test_output_norms_are_for_one_rank() -> None:
    config = BinaryMosConfig(1, ("fc1",), output_norm="layer_norm")
    layer = linear()
    layer.tp_size, layer.tp_rank = 2, 0
    method = BinaryMosLinearMethod(config, ["fc1"], None, complete=False)
    with pytest.raises(ValueError, match=r"fc1: layers with output_norm .*tensor-parallel-size 1"):
        method.create_weights(layer, 64, [64], 64, 64, torch.float32)


def test_a_quantized_head_is_refused_by_name() -> None:
    class ParallelLMHead(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"lm_head is quantized .* ParallelLMHead yet"):
        vllm_config("lm_head").get_quant_method(ParallelLMHead(), "lm_head")


def test_renamed_modules_are_followed() -> None:
    config = vllm_config("model.decoder.fc1")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    method = config.get_quant_method(linear(), "language_model.model.decoder.fc1")
    assert isinstance(method, BinaryMosLinearMethod)
    assert method.names == ["model.decoder.fc1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version.*reads version 1, found 2"),
        ({"format_version": None}, "format_version.*found None"),
        ({"num_experts": 0}, "num_experts.*from 1"),
        ({"num_experts": "4"}, "num_experts"),
        ({"scale_dtype": "float64"}, "scale_dtype"),
        ({"modules": []}, "no quantized layer"),
        ({"modules": ["a", "a"]}, "lists a twice"),
        ({"surprise": 1}, "surprise is not defined"),
    ],
)
def test_a_wrong_config_is_refused(change: dict[str, Any], message: str) -> None:
    config = BinaryMosConfig(4, ("a",)).to_dict() | change
    with pytest.raises(FormatError, match=message):
        BinaryMosVllmConfig.from_config(config)


def test_versions_outside_the_range_are_refused_when_a_model_asks() -> None:
    assert unsupported_vllm() is None
    for version in ("0.28.0", "0.32.0+cpu", "0.32.1rc1"):
        assert unsupported_vllm(version) is None
    for version in ("0.27.1", "0.33.0", "1.0.0"):
        reason = unsupported_vllm(version)
        assert reason is not None
        assert f"found vLLM {version}" in reason
        with pytest.raises(ValueError, match=r"supports vLLM >=0\.28\.0,<0\.33\.0"):
            refusing_config(reason).from_config({})


def test_versions_without_a_token_router_for_cpus_are_named() -> None:
    for version in ("0.30.0", "0.32.0+cpu"):
        assert unsupported_cpu_moe(version) is None
    for version in ("0.28.0", "0.29.1+cpu"):
        assert f"found vLLM {version}" in str(unsupported_cpu_moe(version))


def read(packed: Path) -> tuple[BinaryMosVllmConfig, dict[str, torch.Tensor]]:
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    return BinaryMosVllmConfig.from_config(config), load_file(packed / "model.safetensors")


def damaged(packed: Path, path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    for file in packed.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_whole_checkpoint_is_accepted(packed: Path) -> None:
    config, _ = read(packed)
    config.maybe_update_config(str(packed))
    assert config.biases is not None
    assert config.biases["model.layers.0.self_attn.q_proj"]
    assert not config.biases["model.layers.0.mlp.up_proj"]


def test_any_missing_tensor_is_named(packed: Path, tmp_path: Path) -> None:
    config, tensors = read(packed)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(FormatError, match=rf"^{name} "):
            config.maybe_update_config(str(damaged(packed, tmp_path, rest)))


def test_any_changed_dtype_or_shape_is_named(packed: Path, tmp_path: Path) -> None:
    config, tensors = read(packed)
    for name, tensor in tensors.items():
        other = torch.float32 if tensor.dtype == torch.bfloat16 else torch.bfloat16
        for changed in (tensor.to(other), tensor[:-1].contiguous()):
            with pytest.raises(FormatError, match=rf"^{name}: "):
                config.maybe_update_config(
                    str(damaged(packed, tmp_path, tensors | {name: changed}))
                )


def test_an_added_tensor_is_named(packed: Path, tmp_path: Path) -> None:
    config, tensors = read(packed)
    extra = "model.layers.0.mlp.up_proj.bias"
    with pytest.raises(FormatError, match=rf"^{extra} "):
        config.maybe_update_config(
            str(damaged(packed, tmp_path, tensors | {extra: torch.zeros(160)}))
        )


@pytest.mark.parametrize(("wants", "has"), [(True, False), (False, True)])
def test_a_bias_that_does_not_fit_the_model_is_named(wants: bool, has: bool) -> None:
    method = BinaryMosLinearMethod(BinaryMosConfig(1, ("fc1",)), ["fc1"], [has], complete=True)
    layer = linear()
    layer.register_parameter("bias", torch.nn.Parameter(torch.zeros(2)) if wants else None)
    with pytest.raises(FormatError, match=r"^fc1\.bias is"):
        method._check_bias(layer)
