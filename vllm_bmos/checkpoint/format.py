"""The packed BinaryMoS checkpoint format, version 1: every name, dtype and shape in one place.

`docs/FORMAT.md` is the prose of this module; the converter, the verifier, the vLLM plugin, the
transformers integration and the tests import it, and nothing else spells a tensor name.

Letters: M tokens, N outputs, K inputs, E scaling experts of one linear layer.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

QUANT_METHOD = "binarymos"
FORMAT_VERSION = 1

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MANIFEST_FILE = "bmos_manifest.json"

# Tensor names, each behind "<module>.".
WEIGHT = "weight_packed"  # uint8 [N, ceil(K/8)]: the signs
IN_SCALE = "in_channel_scale"  # scale dtype [E, K]
OUT_SCALE = "out_channel_scale"  # scale dtype [E, N]
ROUTER = "router_weight"  # scale dtype [E, K]
BIAS = "bias"  # any float dtype [N], optional
REQUIRED = (WEIGHT, IN_SCALE, OUT_SCALE, ROUTER)
SCALES = (IN_SCALE, OUT_SCALE, ROUTER)

# A feed-forward expert of a mixture-of-experts layer is three layers, "<experts>.<number>.<name>":
# gate, up and down, as the model families call them. (Not to be confused with scaling experts.)
FFN_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
FFN_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")

# The names safetensors gives to dtypes, as far as a language model's checkpoint uses them.
TORCH_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
SCALE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
MAX_EXPERTS = 256
LAYER_NORM = "layer_norm"  # the one output_norm there is; its epsilon is LAYER_NORM_EPS
LAYER_NORM_EPS = 1e-5


class FormatError(ValueError):
    """A checkpoint breaks the format. The message, one line, names the tensor or key."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # it may quote a library's longer message


class TensorSpec(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str  # safetensors' name, such as "F16"
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def packed_width(K: int) -> int:
    """Bytes that hold the K signs of one row: ceil(K/8)."""
    return (K + 7) // 8


def linear_specs(N: int, K: int, E: int, scale_dtype: str) -> dict[str, TensorSpec]:
    """The required tensors of one quantized linear layer, by their name behind the module's."""
    scale = SCALE_DTYPES[scale_dtype]
    return {
        WEIGHT: TensorSpec("U8", (N, packed_width(K))),
        IN_SCALE: TensorSpec(scale, (E, K)),
        OUT_SCALE: TensorSpec(scale, (E, N)),
        ROUTER: TensorSpec(scale, (E, K)),
    }


@dataclass(frozen=True)
class BinaryMosConfig:
    """`quantization_config` of config.json.

    Attributes:
        num_experts: E, at least 1 (E = 1 is OneBit).
        modules: names of the quantized linear layers as the checkpoint spells them.
        scale_dtype: dtype of every scale and router weight: float16, bfloat16 or float32.
        provenance: free-form record of where the model came from (source, stage, tool_version).
        ignore: the patterns of linear layers that the user asked to leave alone.
        output_norm: "layer_norm" if every layer ends in a LayerNorm over its N outputs, without
            parameters and before the bias, as OneBit's do; else None.
    """

    num_experts: int
    modules: tuple[str, ...]
    scale_dtype: str = "float16"
    provenance: dict[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    output_norm: str | None = None
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise FormatError(
                f"quantization_config.quant_method: expected {QUANT_METHOD!r}, found "
                f"{self.quant_method!r}. This is not a BinaryMoS checkpoint."
            )
        if not _is_int(self.format_version) or self.format_version != FORMAT_VERSION:
            raise FormatError(
                f"quantization_config.format_version: this vllm-bmos reads version "
                f"{FORMAT_VERSION}, found {self.format_version!r}. Upgrade vllm-bmos, or convert "
                "the model again with this version."
            )
        if not _is_int(self.num_experts) or not 1 <= self.num_experts <= MAX_EXPERTS:
            raise FormatError(
                f"quantization_config.num_experts: expected an integer from 1 to {MAX_EXPERTS}, "
                f"found {self.num_experts!r}. Convert the model again."
            )
        if self.scale_dtype not in tuple(SCALE_DTYPES):  # JSON may hold what cannot be hashed
            raise FormatError(
                f"quantization_config.scale_dtype: expected one of {sorted(SCALE_DTYPES)}, found "
                f"{self.scale_dtype!r}. Convert the model again."
            )
        if self.output_norm not in (None, LAYER_NORM):
            raise FormatError(
                f"quantization_config.output_norm: expected {LAYER_NORM!r} or null, found "
                f"{self.output_norm!r}. Convert the model again."
            )
        _check_modules(self.modules)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "BinaryMosConfig":
        """Read `quantization_config`, refusing what version 1 does not define.

        Raises:
            FormatError: naming the key that is missing, unknown or wrong.
        """
        if not isinstance(config, Mapping):
            raise FormatError(
                f"quantization_config: expected an object, found {type(config).__name__}. "
                "Convert the model again."
            )
        known = cls.__dataclass_fields__
        # The version goes first: another version's keys mean nothing here.
        if "quant_method" in config or "format_version" in config:
            cls(
                num_experts=1,
                modules=("x",),
                quant_method=config.get("quant_method", QUANT_METHOD),
                format_version=config.get("format_version", FORMAT_VERSION),
            )
        for key in ("quant_method", "format_version", "num_experts", "modules", "scale_dtype"):
            if key not in config:
                raise FormatError(f"quantization_config.{key} is missing. Convert the model again.")
        for key in config:
            if key not in known:
                raise FormatError(
                    f"quantization_config.{key} is not defined by format version "
                    f"{FORMAT_VERSION}; it defines {sorted(known)}. Remove the key."
                )
        values = dict(config)
        for key in ("modules", "ignore"):
            value = values.get(key, ())
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise FormatError(f"quantization_config.{key}: expected a list of strings.")
            values[key] = tuple(value)
        if not isinstance(values.get("provenance", {}), Mapping):
            raise FormatError("quantization_config.provenance: expected an object.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads."""
        config = asdict(self)
        config["modules"] = list(self.modules)
        config["ignore"] = list(self.ignore)
        return config


def check_linear(
    module: str, specs: Mapping[str, TensorSpec], config: BinaryMosConfig
) -> tuple[int, int]:
    """Check names, dtypes and shapes of one quantized layer; return its (N, K).

    Args:
        module: the layer's name, such as "model.layers.0.mlp.up_proj".
        specs: every tensor of the checkpoint by its full name.
        config: the checkpoint's quantization config.

    Raises:
        FormatError: naming the first tensor that is missing or wrong.
    """
    for suffix in REQUIRED:
        if f"{module}.{suffix}" not in specs:
            raise FormatError(
                f"{module}.{suffix} is missing: a layer listed in quantization_config.modules "
                f"has {', '.join(REQUIRED)}. The checkpoint is incomplete; convert or download "
                "it again."
            )
    in_scale, out_scale = specs[f"{module}.{IN_SCALE}"], specs[f"{module}.{OUT_SCALE}"]
    for suffix, spec in ((IN_SCALE, in_scale), (OUT_SCALE, out_scale)):
        if len(spec.shape) != 2 or 0 in spec.shape:
            raise FormatError(
                f"{module}.{suffix}: expected two non-zero dimensions "
                f"[E, {'K' if suffix == IN_SCALE else 'N'}], found {spec}. Convert the model again."
            )
    N, K = out_scale.shape[1], in_scale.shape[1]
    for suffix, want in linear_specs(N, K, config.num_experts, config.scale_dtype).items():
        found = specs[f"{module}.{suffix}"]
        if found != want:
            raise FormatError(
                f"{module}.{suffix}: expected {want} (N={N}, K={K}, E={config.num_experts}, "
                f"scale_dtype={config.scale_dtype}), found {found}. The checkpoint is damaged or "
                "was written by another tool; convert the model again."
            )
    bias = specs.get(f"{module}.{BIAS}")
    if bias is not None and (bias.dtype not in ("F16", "BF16", "F32") or bias.shape != (N,)):
        raise FormatError(
            f"{module}.{BIAS}: expected a float tensor [{N}], found {bias}. Convert again."
        )
    return N, K


def owner_of(name: str) -> str | None:
    """The module that a tensor of the quantized kind belongs to, or None for any other tensor."""
    module, _, suffix = name.rpartition(".")
    return module if suffix in REQUIRED else None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_modules(modules: tuple[str, ...]) -> None:
    if not modules:
        raise FormatError(
            "quantization_config.modules is empty: the checkpoint has no quantized layer. "
            "Serve it as a dense model, or convert it again."
        )
    seen: set[str] = set()
    for name in modules:
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
            raise FormatError(
                f"quantization_config.modules: {name!r} is not a module name "
                "(dotted words of letters, digits and underscores)."
            )
        if name in seen:
            raise FormatError(f"quantization_config.modules lists {name} twice. Remove one.")
        seen.add(name)
