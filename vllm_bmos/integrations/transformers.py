"""Loads packed checkpoints with `AutoModelForCausalLM.from_pretrained`.

Importing this module registers `quant_method: binarymos` with transformers. The layers run the
reference op: this is the oracle that the engine is compared with.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_bmos import ops
from vllm_bmos.checkpoint import QUANT_METHOD, BinaryMosConfig, FormatError
from vllm_bmos.checkpoint.format import (
    FFN_EXPERT,
    FFN_EXPERT_NAMES,
    IN_SCALE,
    OUT_SCALE,
    ROUTER,
    WEIGHT,
    packed_width,
)
from vllm_bmos.checkpoint.reader import check_files
from vllm_bmos.integrations.experts import is_gated_mlp
from vllm_bmos.output_norm import output_layer_norm

__all__ = ["BinaryMosExperts", "BinaryMosHfConfig", "BinaryMosLinear", "BinaryMosQuantizer"]


class BinaryMosLinear(nn.Module):
    """A packed linear layer: y[..., N] of x[..., K], by `torch.ops.vllm_bmos.linear`.

    Args:
        K: inputs.
        N: outputs.
        E: scaling experts.
        scale_dtype: dtype of scales and router weights; they stay in it whatever the model's is.
        bias: whether there is a bias [N], in the model's dtype.
        output_norm: whether the layer ends in OneBit's LayerNorm.
    """

    weight_packed: torch.Tensor
    in_channel_scale: torch.Tensor
    out_channel_scale: torch.Tensor
    router_weight: torch.Tensor

    def __init__(
        self,
        K: int,
        N: int,
        E: int,
        scale_dtype: torch.dtype,
        bias: bool,
        output_norm: bool = False,
    ) -> None:
        super().__init__()
        self.output_norm = output_norm
        self.in_features, self.out_features = K, N

        self.register_buffer(WEIGHT, torch.zeros(N, packed_width(K), dtype=torch.uint8))
        self.register_buffer(IN_SCALE, torch.zeros(E, K, dtype=scale_dtype))
        self.register_buffer(OUT_SCALE, torch.zeros(E, N, dtype=scale_dtype))
        self.register_buffer(ROUTER, torch.zeros(E, K, dtype=scale_dtype))
        self.bias = nn.Parameter(torch.zeros(N)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on x[..., K], in x's dtype."""
        y = ops.linear(
            x.reshape(-1, self.in_features),
            None,
            self.weight_packed,
            self.in_channel_scale.unsqueeze(0),
            self.out_channel_scale,
            self.router_weight.unsqueeze(0),
            None if self.output_norm else self.bias,
            [self.out_features],
            "reference",
        )
        if self.output_norm:
            y = output_layer_norm(y, self.bias, [self.out_features])
        return y.view(*x.shape[:-1], self.out_features)

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """G[M,E] in float32, of x[..., K] with M tokens."""
        x = x.reshape(-1, self.in_features).float()
        return (x @ self.router_weight.float().T).softmax(dim=-1)


class BinaryMosExperts(nn.Module):
    """The feed-forward experts of a mixture-of-experts layer, each of three packed layers.

    It takes the place of transformers' module, whose experts share two 3-D weights.

    Args:
        experts: that module; its activation and sizes are kept.
        names: what gate, up and down are called.
        config: E, the dtype of the scales, and so on.
    """

    def __init__(
        self, experts: nn.Module, names: tuple[str, str, str], config: BinaryMosConfig
    ) -> None:
        super().__init__()
        self.names = names
        self.act_fn: Any = experts.act_fn
        weight: Any = experts.gate_up_proj
        self.number, N, K = weight.shape
        sizes = (K, N // 2), (K, N // 2), (N // 2, K)
        for i in range(self.number):
            layers = [_packed(*size, config) for size in sizes]
            self.add_module(str(i), nn.ModuleDict(dict(zip(names, layers, strict=True))))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum, for x[M, H], over the experts top_k_index[M, top_k]."""
        gate, up, down = self.names
        result = torch.zeros_like(hidden_states)
        for i in range(self.number):
            expert: Any = self.get_submodule(str(i))
            token, place = torch.where(top_k_index == i)
            x = hidden_states[token]
            y = expert[down](self.act_fn(expert[gate](x)) * expert[up](x))
            y = y * top_k_weights[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result


def _packed(K: int, N: int, config: BinaryMosConfig, bias: bool = False) -> BinaryMosLinear:
    scale_dtype = getattr(torch, config.scale_dtype)
    return BinaryMosLinear(K, N, config.num_experts, scale_dtype, bias, bool(config.output_norm))


class BinaryMosHfConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json as transformers holds it."""

    def __init__(self, **values: Any) -> None:
        self.config = BinaryMosConfig.from_dict(values)
        self.quant_method = self.config.quant_method

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return self.config.to_dict()


class BinaryMosQuantizer(HfQuantizer):
    """Puts BinaryMosLinear layers where the checkpoint says before transformers loads it."""

    requires_calibration = True
    quantization_config: BinaryMosHfConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config.config
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if files:  # those that transformers will read, from a directory or a hub's cache
            check_files(config, files)
        experts: dict[str, set[tuple[int, str]]] = defaultdict(set)
        for name, own in zip(config.modules, own_names(model, config.modules), strict=True):
            linear = _submodule(model, own)
            match = FFN_EXPERT.fullmatch(own)
            if isinstance(linear, nn.Linear):
                packed = _packed(
                    linear.in_features, linear.out_features, config, linear.bias is not None
                )
                model.set_submodule(own, packed.to(linear.weight.device))
            elif match and hasattr(_submodule(model, match[1]), "gate_up_proj"):
                experts[match[1]].add((int(match[2]), match[3]))
            else:
                raise FormatError(
                    f"quantization_config.modules: {name} is not a linear layer of "
                    f"{type(model).__name__}. config.json and the weights do not belong together."
                )
        for name, layers in experts.items():
            self._replace_experts(model, name, layers)
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        # Of a quantized model, transformers leaves what it renames (Mixtral's token router) in the
        # checkpoint's dtype.
        in_fp32 = [
            *(model._keep_in_fp32_modules or []),
            *(model._keep_in_fp32_modules_strict or []),
        ]
        for name, parameter in model.named_parameters():
            if not any(kept in name for kept in in_fp32):
                parameter.data = parameter.data.to(self.dtypes[name])
        return model

    def _replace_experts(
        self, model: PreTrainedModel, name: str, layers: set[tuple[int, str]]
    ) -> None:
        old = model.get_submodule(name)
        for names in FFN_EXPERT_NAMES:
            if layers == {(i, leaf) for i in range(len(old.gate_up_proj)) for leaf in names}:
                break
        else:
            raise FormatError(
                f"quantization_config.modules: {name} has {len(old.gate_up_proj)} feed-forward "
                "experts, and not every one is listed with gate, up and down. Convert the model "
                "again."
            )
        if not is_gated_mlp(old):
            raise FormatError(
                f"{name}: {type(old).__name__} has biases or a gate of its own, which quantized "
                r"feed-forward experts cannot have. Convert the model with --ignore '\.experts'."
            )
        new = BinaryMosExperts(old, names, self.quantization_config.config)
        model.set_submodule(name, new.to(old.gate_up_proj.device))

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Let transformers fuse dense weights only: "w1.weight" is found in "w1.weight_packed"."""
        return [
            WeightConverter(
                [f"{pattern}$" for pattern in conversion._original_source_patterns],
                conversion._original_target_patterns,
                conversion.operations,
            )
            if isinstance(conversion, WeightConverter)
            else conversion
            for conversion in weight_conversions
        ]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """No: packed checkpoints are written by the converter."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: the signs are frozen bits."""
        return False


def own_names(model: PreTrainedModel, modules: tuple[str, ...]) -> list[str]:
    """What transformers calls the checkpoint's modules: Mixtral's differ, or lack the prefix."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    own = []
    for module in modules:
        name = f"{module}.{WEIGHT}"
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        name = name.removesuffix(f".{WEIGHT}")
        inside = f"{model.base_model_prefix}.{name}"
        own.append(
            inside if _submodule(model, name) is None and _submodule(model, inside) else name
        )
    return own


def _submodule(model: PreTrainedModel, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(BinaryMosHfConfig)
    register_quantizer(QUANT_METHOD)(BinaryMosQuantizer)
