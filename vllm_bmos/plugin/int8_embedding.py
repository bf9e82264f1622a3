"""Embeddings and lm_head in 8 bits, on a CPU, where VLLM_BMOS_EMBEDDINGS=int8 asks for it.

Beside 1-bit layers they are most of what is left: 0.5 of a LLaMA-7B's 1.4 GB, 2.5 of a Qwen3-8B's
3.4, and each step reads the whole head. A row, one word of the vocabulary, becomes integers from
-127 to 127 and one scale, when the weights are loaded; the checkpoint stays as it is.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn import Parameter
from typing_extensions import override
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from vllm_bmos.plugin import narrow
from vllm_bmos.plugin.embedding import AfterWarmUp, LeanEmbeddingMethod
from vllm_bmos.plugin.state import STATE_FORMATS

__all__ = ["EMBEDDINGS_ENV", "Int8EmbeddingMethod", "int8_wanted", "quantize"]

logger = init_logger(__name__)

EMBEDDINGS_ENV = "VLLM_BMOS_EMBEDDINGS"
LARGEST = 127
# Whose code in vLLM looks at the weight itself, and would take the integers for it.
LOOK_AT_WEIGHTS = {
    "DiffusionGemmaForConditionalGeneration",
    "EmbeddingGemma2Model",
    "Gemma4MTPModel",
}


def int8_wanted() -> bool:
    """Whether VLLM_BMOS_EMBEDDINGS asks for 8 bits.

    Raises:
        ValueError: if it asks for something else, or where 8 bits cannot be had.
    """
    value = os.environ.get(EMBEDDINGS_ENV)
    if not value:
        return False
    told = f"{EMBEDDINGS_ENV}={value}"
    if value != "int8":
        raise ValueError(f"{told}: unknown; it takes int8. Unset it to keep the dtype.")
    if not current_platform.is_cpu():
        raise ValueError(f"{told} is for CPUs only. Unset it to serve on this device.")
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return True
    if config.load_config.load_format in STATE_FORMATS:
        raise ValueError(
            f"{told}: --load-format {config.load_config.load_format} takes tensors as they were in "
            "memory, so nothing can be quantized. Unset it, or serve the checkpoint itself."
        )
    model = config.model_config
    if model.runner_type == "generate" and model.head_dtype != model.dtype:
        raise ValueError(
            f"{told}: for logits in another dtype than the model's (head_dtype {model.head_dtype}, "
            f"dtype {model.dtype}) vLLM needs a dense lm_head. Unset one of the two."
        )
    strange = LOOK_AT_WEIGHTS.intersection(model.architectures)
    if strange:
        raise ValueError(
            f"{told}: vLLM's {strange.pop()} looks at the weights of its embeddings itself, and "
            "would take the integers for them. Unset it to serve this model."
        )
    return True


class Int8EmbeddingMethod(QuantizeMethodBase):
    """Loads a table as it is and keeps integers: `weight` int8[N,K] and `weight_scale`[N].

    It is no UnquantizedEmbeddingMethod, as vLLM multiplies by the weights of those itself where
    logits are to have another dtype.

    Args:
        name: of the layer, for the log.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.after_warm_up = AfterWarmUp()
        self.plain: LeanEmbeddingMethod | None = None  # of a head that shares a dense table

    @override
    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        if "weight_loader" in attributes:
            attributes["weight_loader"] = _refusing_integers(attributes["weight_loader"], self.name)
        UnquantizedEmbeddingMethod().create_weights(layer, *sizes, **attributes)
        weight = layer.get_parameter("weight")
        weight.row_scale = None  # type: ignore[attr-defined]
        layer.activation_dtype = weight.dtype  # type: ignore[assignment]

    @override
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = layer.get_parameter("weight")
        if not hasattr(weight, "row_scale"):
            logger.warning(
                "BinaryMoS: %s stays as it is: it is tied to a table that vLLM builds without "
                "quantization for this model.",
                self.name,
            )
            self.plain = LeanEmbeddingMethod()
            self.plain.process_weights_after_loading(layer)
            return
        if weight.dtype != torch.int8:
            # The parameter stays, as a tied head has the same one; so does its scale.
            weight.data, weight.row_scale = quantize(weight.data)
            logger.info("BinaryMoS: %s is kept in 8 bits.", self.name)
        # Persistent: a state that is saved with it is not loaded where nobody expects integers.
        layer.register_buffer("weight_scale", weight.row_scale)

    @override
    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        scale = layer.get_buffer("weight_scale")
        codes = torch.nn.functional.embedding(input_, layer.get_parameter("weight"))
        return (codes * scale[input_].unsqueeze(-1)).to(layer.activation_dtype)  # type: ignore[arg-type]

    @override
    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.plain is not None:
            return self.plain.apply(layer, x, bias)
        self.after_warm_up()
        scale = layer.get_buffer("weight_scale")
        return narrow.linear(x, layer.get_parameter("weight"), bias, scale)


def _refusing_integers(loader: Callable[..., None], name: str) -> Callable[..., None]:
    """The loader of a table, stopped where it would copy a checkpoint's numbers into integers."""

    @wraps(loader)
    def load(param: Parameter, loaded_weight: torch.Tensor) -> None:
        if param.dtype == torch.int8:
            raise ValueError(
                f"{name}: its weights are in 8 bits, so that a checkpoint's cannot be copied into "
                "them. Use vLLM's reload_weights in place of load_weights."
            )
        loader(param, loaded_weight)

    return load


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of the rows of weight[N,K]: int8[N,K] and float32[N]."""
    codes = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32)
    # In parts: a copy of a whole table would be the most that loading takes.
    parts = zip(*(t.split(narrow.ROWS) for t in (weight, codes, scale)), strict=True)
    for rows, found, row_scale in parts:
        wide = rows.float()
        row_scale.copy_(wide.abs().amax(1) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        found.copy_((wide / row_scale.unsqueeze(1)).round_())
    return codes, scale
