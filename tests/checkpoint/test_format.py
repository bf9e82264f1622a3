"""The quantization config and the tensors of one layer."""

import pytest

from vllm_bmos.checkpoint.format import (
    MAX_EXPERTS,
    BinaryMosConfig,
    FormatError,
    TensorSpec,
    check_linear,
    linear_specs,
    owner_of,
    packed_width,
)

GOOD = BinaryMosConfig(
    num_experts=4, modules=("a.b", "a.c"), provenance={"source": "dense"}, ignore=("lm",)
)


def test_config_round_trip():
    assert BinaryMosConfig.from_dict(GOOD.to_dict()) == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method: expected 'binarymos', found 'gptq'"),
        ({"format_version": 2}, "format_version: this vllm-bmos reads version 1, found 2"),
        ({"format_version": "1"}, "format_version: .* found '1'"),
        ({"format_version": True}, "format_version: .* found True"),
        ({"num_experts": 0}, f"num_experts: expected an integer from 1 to {MAX_EXPERTS}, found 0"),
        ({"num_experts": MAX_EXPERTS + 1}, "num_experts"),
        ({"num_experts": True}, "num_experts"),
        ({"num_experts": 4.0}, "num_experts"),
        ({"scale_dtype": "float8"}, "scale_dtype: expected one of"),
        ({"scale_dtype": ["float16"]}, "scale_dtype: expected one of"),
        ({"modules": []}, "modules is empty"),
        ({"modules": ["a", "a"]}, "lists a twice"),
        ({"modules": ["../a"]}, "'../a' is not a module name"),
        ({"modules": "a.b"}, "modules: expected a list of strings"),
        ({"ignore": [1]}, "ignore: expected a list of strings"),
        ({"provenance": []}, "provenance: expected an object"),
        ({"output_norm": "rms"}, "output_norm: expected 'layer_norm' or null, found 'rms'"),
        ({"group_size": 128}, "group_size is not defined by format version 1"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(FormatError, match=message):
        BinaryMosConfig.from_dict(GOOD.to_dict() | change)


@pytest.mark.parametrize(
    "key", ["quant_method", "format_version", "num_experts", "modules", "scale_dtype"]
)
def test_config_refuses_a_missing_key(key):
    config = GOOD.to_dict()
    del config[key]
    with pytest.raises(FormatError, match=f"quantization_config.{key} is missing"):
        BinaryMosConfig.from_dict(config)


def test_config_refuses_what_is_not_an_object():
    with pytest.raises(FormatError, match="expected an object, found list"):
        BinaryMosConfig.from_dict([])


def test_another_version_is_refused_before_its_keys_are_read():
    config = GOOD.to_dict() | {"format_version": 9, "modules": {"of": "version 9"}}
    with pytest.raises(FormatError, match="reads version 1, found 9"):
        BinaryMosConfig.from_dict(config)


@pytest.mark.parametrize(("K", "width"), [(1, 1), (7, 1), (8, 1), (9, 2), (576, 72), (1537, 193)])
def test_packed_width(K, width):
    assert packed_width(K) == width


def layer(N=6, K=11, E=4, scale_dtype="float16"):
    return {f"a.b.{name}": spec for name, spec in linear_specs(N, K, E, scale_dtype).items()}


def test_linear_specs():
    assert linear_specs(6, 11, 4, "bfloat16") == {
        "weight_packed": TensorSpec("U8", (6, 2)),
        "in_channel_scale": TensorSpec("BF16", (4, 11)),
        "out_channel_scale": TensorSpec("BF16", (4, 6)),
        "router_weight": TensorSpec("BF16", (4, 11)),
    }
    assert check_linear("a.b", layer(), GOOD) == (6, 11)


@pytest.mark.parametrize("name", list(layer()))
@pytest.mark.parametrize("fault", ["missing", "dtype", "rows", "columns", "rank", "empty"])
def test_check_linear_names_the_tensor(name, fault):
    specs = layer()
    dtype, (rows, columns) = specs[name]
    broken = {
        "dtype": TensorSpec("F32" if dtype == "F16" else "I8", (rows, columns)),
        "rows": TensorSpec(dtype, (rows + 1, columns)),
        # One column more of in_channel_scale changes K itself: then the others do not fit it.
        "columns": TensorSpec(dtype, (rows, columns + 8)),
        "rank": TensorSpec(dtype, (rows, columns, 1)),
        "empty": TensorSpec(dtype, (rows, 0)),
    }
    del specs[name]
    if fault != "missing":
        specs[name] = broken[fault]
    owner = {
        ("a.b.in_channel_scale", "columns"): "a.b.weight_packed",
        ("a.b.out_channel_scale", "columns"): "a.b.weight_packed",
    }.get((name, fault), name)
    with pytest.raises(FormatError, match=f"^{owner}"):
        check_linear("a.b", specs, GOOD)


@pytest.mark.parametrize("bias", [TensorSpec("F16", (5,)), TensorSpec("I64", (6,))])
def test_check_linear_refuses_a_wrong_bias(bias):
    with pytest.raises(FormatError, match=r"^a.b.bias: expected a float tensor \[6\]"):
        check_linear("a.b", {**layer(), "a.b.bias": bias}, GOOD)
    assert check_linear("a.b", {**layer(), "a.b.bias": TensorSpec("F32", (6,))}, GOOD) == (6, 11)


def test_owner_of():
    assert owner_of("a.b.weight_packed") == "a.b"
    assert owner_of("a.b.router_weight") == "a.b"
    assert owner_of("a.b.weight") is None
