"""Every kind of source becomes what docs/FORMAT.md says, recomputed from the source's files."""

import json
import shutil

import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from converters.compare import compare
from converters.options import Options
from converters.pipeline import convert
from converters.plan import make_plan
from converters.sources import gguf
from tests.converters.models import (
    make_dense,
    make_gguf,
    make_official,
    make_onebit,
    sign_bits,
)
from vllm_bmos.checkpoint import Checkpoint, FormatError
from vllm_bmos.checkpoint.verify import verify

MODULE = "model.layers.1.mlp.gate_proj"


def run(source, target, **options):
    plan = make_plan(source, Options(**options))
    zeros = convert(plan, target)
    checkpoint = verify(target)
    assert compare(checkpoint, source).startswith("signs, scales, carried tensors and side files")
    return plan, checkpoint, zeros


def source_tensors(path):
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def add(path, **changes):
    """Change the tensors of a one-file source."""
    tensors = load_file(path / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors")


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense(tmp_path, dtype):
    source = make_dense(tmp_path / "source", dtype=dtype)
    plan, checkpoint, _ = run(source, tmp_path / "target", experts=3)
    assert plan.source.kind == "dense" and checkpoint.config.num_experts == 3
    dense = source_tensors(source)
    for module in checkpoint.config.modules:
        weight = dense.pop(f"{module}.weight")
        assert torch.equal(checkpoint.tensor(f"{module}.weight_packed"), sign_bits(weight))
        U, S, Vh = torch.linalg.svd(weight.double().abs(), full_matrices=False)
        scale = S[0].sqrt()
        for name, row in (("out_channel_scale", U[:, 0]), ("in_channel_scale", Vh[0])):
            found = checkpoint.tensor(f"{module}.{name}")
            assert found.dtype == torch.float16
            torch.testing.assert_close(
                found.double(), (row.abs() * scale).repeat(3, 1), rtol=1e-3, atol=1e-6
            )
        assert not checkpoint.tensor(f"{module}.router_weight").any()
    for name, value in dense.items():
        assert checkpoint.tensor(name).dtype == value.dtype
        assert torch.equal(checkpoint.tensor(name), value)


def test_ignore_is_honoured_and_recorded(tmp_path):
    source = make_dense(tmp_path / "source")
    _, checkpoint, _ = run(source, tmp_path / "target", ignore=(r"layers\.0\.", "down_proj$"))
    assert checkpoint.config.ignore == (r"layers\.0\.", "down_proj$")
    assert all("layers.1." in name for name in checkpoint.config.modules)
    assert "model.layers.1.mlp.down_proj.weight" in checkpoint.specs
    assert "model.layers.0.mlp.up_proj.weight" in checkpoint.specs
    with pytest.raises(FormatError, match="no linear layer is left to pack"):
        make_plan(source, Options(ignore=("",)))


def test_official(tmp_path):
    source = make_official(tmp_path / "source", shard_bytes=30_000)
    assert len(list(source.glob("*.safetensors"))) > 2
    plan, checkpoint, zeros = run(source, tmp_path / "target")
    assert plan.source.kind == "official" and zeros == {}
    assert len(checkpoint.config.modules) == 14 and checkpoint.config.num_experts == 4
    stored = source_tensors(source)
    names = {
        "in_channel_scale": "in_channel_scale",
        "out_channel_scale": "out_channel_scale",
        "router_weight": "gate_linear.weight",
    }
    for module in checkpoint.config.modules:
        packed = sign_bits(stored.pop(f"{module}.weight"))
        assert torch.equal(checkpoint.tensor(f"{module}.weight_packed"), packed)
        for ours, theirs in names.items():
            assert torch.equal(
                checkpoint.tensor(f"{module}.{ours}"), stored.pop(f"{module}.{theirs}")
            )
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in stored.items())
    config = checkpoint.model_config
    assert config["architectures"] == ["LlamaForCausalLM"] and "num_expert" not in config


def test_official_zeros_are_counted_by_tensor(tmp_path):
    source = make_official(tmp_path / "source")
    weight = load_file(source / "model.safetensors")[f"{MODULE}.weight"]
    weight[0, 1], weight[3, 7] = 0.0, -0.0
    add(source, **{f"{MODULE}.weight": weight})
    edit_config(source, architectures=["BinaryMoSForCausalLM"])
    _, checkpoint, zeros = run(source, tmp_path / "target")
    assert zeros == {MODULE: 2}
    assert checkpoint.config.provenance["zeros_to_plus_one"] == 2
    packed = checkpoint.tensor(f"{MODULE}.weight_packed")
    assert packed[0, 0] >> 1 & 1 == 1 and packed[3, 0] >> 7 & 1 == 1
    assert checkpoint.model_config["architectures"] == ["LlamaForCausalLM"]


def test_official_layers_of_another_family(tmp_path):
    source = make_official(tmp_path / "source")
    edit_config(source, model_type="mistral")
    _, checkpoint, _ = run(source, tmp_path / "target")
    assert checkpoint.model_config["architectures"] == ["MistralForCausalLM"]


def test_scale_dtypes_are_kept_or_widened_to_hold_a_mixture(tmp_path):
    source = make_official(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    scales = [n for n in tensors if "scale" in n or "gate_linear" in n]
    add(source, **{name: tensors[name].bfloat16() for name in scales})
    _, checkpoint, _ = run(source, tmp_path / "bf16")
    assert checkpoint.config.scale_dtype == "bfloat16"
    add(source, **{scales[0]: tensors[scales[0]]})
    _, checkpoint, _ = run(source, tmp_path / "mixed")
    assert checkpoint.config.scale_dtype == "float32"
    assert torch.equal(
        checkpoint.tensor(f"{MODULE}.in_channel_scale"),
        tensors[f"{MODULE}.in_channel_scale"].bfloat16().float(),
    )
    _, checkpoint, _ = run(source, tmp_path / "asked", scale_dtype="float16")
    assert checkpoint.config.scale_dtype == "float16"


@pytest.mark.parametrize("suffix", ["weight", "gate_linear.weight", "in_channel_scale"])
@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_official_faults_are_named(tmp_path, suffix, fault):
    source = make_official(tmp_path / "source")
    name = f"{MODULE}.{suffix}"
    value = load_file(source / "model.safetensors")[name]
    broken = {"missing": None, "shape": value[:, :-1].clone(), "dtype": value.to(torch.int32)}
    add(source, **{name: broken[fault]})
    with pytest.raises(FormatError, match=name):
        make_plan(source, Options())


@pytest.mark.parametrize("experts", [None, 0, "4", 3])
def test_official_number_of_experts_must_be_right(tmp_path, experts):
    source = make_official(tmp_path / "source")
    edit_config(source, num_expert=experts)
    with pytest.raises(FormatError, match=r"num_expert|in_channel_scale: expected"):
        make_plan(source, Options())


def test_official_scales_of_an_unknown_layer(tmp_path):
    source = make_official(tmp_path / "source")
    add(source, **{"lm_head.in_channel_scale": torch.ones(4, 40).half()})
    with pytest.raises(FormatError, match=r"lm_head\.in_channel_scale: lm_head is not a linear"):
        make_plan(source, Options())


@pytest.mark.parametrize("kind", ["official", "onebit"])
def test_ignore_has_no_meaning_for_binary_sources(tmp_path, kind):
    path = tmp_path / "source"
    source = make_official(path) if kind == "official" else make_onebit(path, packed=False)
    with pytest.raises(FormatError, match="--ignore"):
        make_plan(source, Options(ignore=("x",)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onebit(tmp_path, packed, dtype):
    source = make_onebit(tmp_path / "source", packed, dtype)
    latent = source_tensors(make_onebit(tmp_path / "latent", packed=False))
    plan, checkpoint, zeros = run(source, tmp_path / "target")
    assert plan.source.kind == "onebit" and checkpoint.config.num_experts == 1
    assert checkpoint.config.output_norm == "layer_norm"
    assert checkpoint.config.scale_dtype == str(dtype).removeprefix("torch.")
    assert (sum(zeros.values()) == len(checkpoint.config.modules)) is not packed
    stored = source_tensors(source)
    for module in checkpoint.config.modules:
        signs = sign_bits(latent[f"{module}.weight"])
        assert torch.equal(checkpoint.tensor(f"{module}.weight_packed"), signs)
        for ours, theirs in (
            ("in_channel_scale", "input_factor"),
            ("out_channel_scale", "weight_scale"),
        ):
            found = checkpoint.tensor(f"{module}.{ours}")
            assert torch.equal(found, stored[f"{module}.{theirs}"][None])
    config = checkpoint.model_config
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            "rope_freqs",
        ),
        (lambda writer: writer.add_rope_scaling_factor(8.0), r"llama\.rope\.scaling\.factor"),
    ],
)
def test_what_transformers_would_leave_out_of_a_gguf_is_refused(tmp_path, more, named):
    file, _ = make_gguf(tmp_path / "tiny.gguf", more=more)
    with pytest.raises(FormatError, match=f"{named}.*: transformers does not read this from GGUF"):
        make_plan(file, Options())


def test_a_gguf_without_the_number_of_kv_heads_is_refused(tmp_path):
    file, _ = make_gguf(tmp_path / "tiny.gguf", kv_heads_said=False)
    with pytest.raises(FormatError, match="head_count_kv is missing"):
        make_plan(file, Options())


@pytest.mark.parametrize(
    ("said", "pre", "begins"),
    [
        (None, "default", False),
        (None, "llama-bpe", True),
        (False, "llama-bpe", False),
        (True, "default", True),
    ],
)
def test_a_gguf_says_whether_texts_begin_with_bos(tmp_path, said, pre, begins):
    def more(writer):
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        writer.kv_data[0]["tokenizer.ggml.pre"].value = pre
        if said is not None:
            writer.add_add_bos_token(said)

    file, _ = make_gguf(tmp_path / "tiny.gguf", more=more)
    run(file, tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    starts = [row[0] == tokenizer.bos_token_id == 1 for row in tokenizer(["\u0105"]).input_ids]
    assert starts == [begins]


@pytest.mark.parametrize("block_rows", [4096, 7])
def test_gguf(tmp_path, monkeypatch, block_rows):
    monkeypatch.setattr(gguf, "BLOCK_ROWS", block_rows)
    file, expected = make_gguf(tmp_path / "tiny.gguf")
    plan, checkpoint, _ = run(file, tmp_path / "target")
    assert plan.source.kind == "gguf"
    config = checkpoint.model_config
    assert config["rms_norm_eps"] == 1e-5 and config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    for module in checkpoint.config.modules:
        weight = expected.pop(f"{module}.weight").bfloat16()
        assert torch.equal(checkpoint.tensor(f"{module}.weight_packed"), sign_bits(weight))
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value.bfloat16())
    template = (tmp_path / "target/chat_template.jinja").read_text()
    assert template == "{{ messages[0]['content'] }}"
    assert json.loads((tmp_path / "target/generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert (tmp_path / "target/tokenizer.json").is_file()
    assert "license: apache-2.0" in (tmp_path / "target/README.md").read_text()


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_gives_the_same_checkpoint_as_safetensors(tmp_path, sharded):
    shard_bytes = 30_000 if sharded else 10**9
    first = make_official(tmp_path / "a/source", shard_bytes=shard_bytes)
    second = make_official(tmp_path / "b/source", shard_bytes=shard_bytes, as_bin=True)
    assert (len(list(second.glob("*.bin"))) > 1) is sharded
    for source in (first, second):
        run(source, source.parent / "target")
    for file in (tmp_path / "a/target").iterdir():
        assert file.read_bytes() == (tmp_path / "b/target" / file.name).read_bytes()


def test_unused_buffers_are_carried_in_any_dtype(tmp_path):
    source = make_dense(tmp_path / "source")
    buffers = {"model.position_ids": torch.arange(9), "model.mask": torch.tensor([True, False])}
    add(source, **buffers)
    run(source, tmp_path / "target")
    loaded = load_file(tmp_path / "target/model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in buffers.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dense", f"{MODULE}.weight"),
        ("official", f"{MODULE}.weight"),
        ("official", f"{MODULE}.in_channel_scale"),
        ("official", f"{MODULE}.gate_linear.weight"),
    ],
)
def test_nan_and_infinity_end_the_conversion(tmp_path, kind, name, value):
    make = {"dense": make_dense, "official": make_official}[kind]
    source = make(tmp_path / "source")
    tensor = load_file(source / "model.safetensors")[name]
    tensor[1, 2] = value
    add(source, **{name: tensor})
    named = name.replace("gate_linear.weight", "router_weight")
    with pytest.raises(FormatError, match=f"{named} holds NaN or infinity"):
        convert(make_plan(source, Options()), tmp_path / "target")
    assert not list(tmp_path.glob("target*"))


def test_a_scale_that_overflows_says_what_to_do(tmp_path):
    source = make_dense(tmp_path / "source")
    weight = load_file(source / "model.safetensors")[f"{MODULE}.weight"]
    add(source, **{f"{MODULE}.weight": weight * 1e12})
    with pytest.raises(FormatError, match=r"_scale holds NaN or infinity.* --scale-dtype"):
        convert(make_plan(source, Options()), tmp_path / "target")
    run(source, tmp_path / "wide", scale_dtype="float32")


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FormatError, match=r"neither a directory nor a \.gguf file"):
        make_plan(tmp_path / "absent", Options())
    with pytest.raises(FormatError, match=r"absent\.gguf is missing"):
        make_plan(tmp_path / "absent.gguf", Options())
    with pytest.raises(FormatError, match=r"config\.json is missing"):
        make_plan(tmp_path, Options())
    shutil.copy(make_dense(tmp_path / "source") / "config.json", tmp_path)
    with pytest.raises(FormatError, match=r"holds no weights: none of model\.safetensors"):
        make_plan(tmp_path, Options())


def test_packed_and_otherwise_quantized_sources(tmp_path):
    source = make_dense(tmp_path / "source")
    run(source, tmp_path / "target")
    with pytest.raises(FormatError, match="is a packed BinaryMoS checkpoint already"):
        make_plan(tmp_path / "target", Options())
    edit_config(source, quantization_config={"quant_method": "gptq"})
    with pytest.raises(FormatError, match="quantized by 'gptq'"):
        make_plan(source, Options())


def test_verify_against_another_source_names_the_difference(tmp_path):
    source = make_dense(tmp_path / "source")
    run(source, tmp_path / "target")
    tensors = load_file(source / "model.safetensors")
    for name, value in (
        (f"{MODULE}.weight", -tensors[f"{MODULE}.weight"]),
        (f"{MODULE}.weight", tensors[f"{MODULE}.weight"] * 2),
        ("model.norm.weight", tensors["model.norm.weight"] + 1),
    ):
        add(source, **{name: value})
        owner = name if name == "model.norm.weight" else MODULE
        with pytest.raises(FormatError, match=owner):
            compare(Checkpoint(tmp_path / "target"), source)
        add(source, **{name: tensors[name]})
    compare(Checkpoint(tmp_path / "target"), source)
    (tmp_path / "target/generation_config.json").write_text("{}")
    with pytest.raises(FormatError, match="generation_config"):
        compare(Checkpoint(tmp_path / "target"), source)
    edit_config(source, rope_theta=1.0)
    with pytest.raises(FormatError, match=r"config\.json: rope_theta"):
        compare(Checkpoint(tmp_path / "target"), source)
