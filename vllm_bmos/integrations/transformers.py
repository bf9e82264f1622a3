"""Loads packed checkpoints with `AutoModelForCausalLM.from_pretrained`.

Importing this module registers `quant_method: binarymos` with transformers. The layers run the
reference op unless another kernel is named: this is the oracle that the engine is compared with.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_bmos import ops
from vllm_bmos.checkpoint import QUANT_METHOD, BinaryMosConfig, Checkpoint, FormatError
from vllm_bmos.checkpoint.format import (
    IN_SCALE,
    OUT_SCALE,
    ROUTER,
    WEIGHT,
    packed_width,
)
from vllm_bmos.output_norm import output_layer_norm

__all__ = ["BinaryMosHfConfig", "BinaryMosLinear", "BinaryMosQuantizer"]


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
        path = Path(model.config.name_or_path or "")
        if path.is_dir():
            Checkpoint(path)
        scale_dtype = getattr(torch, config.scale_dtype)
        for name in config.modules:
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise FormatError(
                    f"quantization_config.modules: {name} is not a linear layer of "
                    f"{type(model).__name__}. config.json and the weights do not belong together."
                )
            packed = BinaryMosLinear(
                linear.in_features,
                linear.out_features,
                config.num_experts,
                scale_dtype,
                linear.bias is not None,
                config.output_norm is not None,
            )
            model.set_submodule(name, packed.to(linear.weight.device))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """No: packed checkpoints are written by the converter."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: the signs are frozen bits."""
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(BinaryMosHfConfig)
    register_quantizer(QUANT_METHOD)(BinaryMosQuantizer)
