"""vLLM's own linear layers, chosen and loaded by vLLM's own code for this machine."""

import copy
import importlib.util
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from peers.base import Loaded, LoadedLayers, Mode, Peer, Weights

W4_GROUP = 128
Layer = Callable[[torch.Tensor], torch.Tensor]


class VllmPeer(Peer):
    """Shared by the peers that call vLLM's layers on a CPU."""

    @override
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "vllm is not installed"
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return f"this vllm is built for {current_platform.device_name}, not for CPUs"
        return None

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        from vllm.config import VllmConfig, set_current_vllm_config

        default = torch.get_default_dtype()
        torch.set_default_dtype(weights.dtype)  # vLLM's loader runs under the model's dtype
        try:
            with set_current_vllm_config(VllmConfig()):
                return LoadedLayers(self.load_all(weights, copies))
        finally:
            torch.set_default_dtype(default)

    @abstractmethod
    def load_all(self, weights: Weights, copies: int) -> list[Layer]:
        """Separate copies of the layer as functions of x."""


class VllmBf16(VllmPeer):
    """What vLLM runs for an unquantized nn.Linear (oneDNN, an AMX kernel or zentorch)."""

    name = "vllm_bf16"

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        if weights.dtype == torch.float32:
            return [Mode("fp32", "fp32", 1e-5, 32)]
        return [Mode(str(weights.dtype).removeprefix("torch."), "bf16", 4e-3, 16)]

    @override
    def load_all(self, weights: Weights, copies: int) -> list[Layer]:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        layers: list[Layer] = []
        for _ in range(copies):
            layer: Any = torch.nn.Module()
            layer.weight = _frozen(weights.dense.clone())
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            layers.append(partial(layer.cpu_linear, weight=layer.weight, bias=None))
        return layers


class VllmW8A8(VllmPeer):
    """int8 weights with a scale a row, int8 activations with a scale a token."""

    name = "vllm_w8a8"

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        return [Mode("w8a8", "int8", 2e-2, 8)] if weights.dtype == torch.bfloat16 else []

    @override
    def load_all(self, weights: Weights, copies: int) -> list[Layer]:
        from vllm.model_executor.kernels.linear import init_int8_linear_kernel

        # Half the range: without VNNI oneDNN adds two products in 16 bits, which codes of +-127
        # overflow. A model's codes, few of which are that large, hardly ever do.
        int8 = weights.signs(torch.int8) * 64
        scale = torch.full((weights.N, 1), weights.scale / 64, dtype=torch.float32)
        layers: list[Layer] = []
        for _ in range(copies):
            kernel = init_int8_linear_kernel(  # one a copy: on some machines it holds the weight
                is_channelwise=True,
                is_static_input_scheme=False,
                input_symmetric=True,
                module_name="benchmark",
            )
            layer: Any = torch.nn.Module()
            layer.weight, layer.weight_scale = _frozen(int8.clone()), _frozen(scale)
            layer.input_scale = layer.input_zero_point = layer.azp_adj = layer.bias = None
            layer.logical_widths = [weights.N]
            kernel.process_weights_after_loading(layer)
            layers.append(partial(kernel.apply_weights, layer))
        return layers


class VllmW4A16(VllmPeer):
    """4-bit weights (GPTQ layout) in groups of 128, 16-bit activations."""

    name = "vllm_w4a16"

    @override
    def unavailable(self) -> str | None:
        if reason := super().unavailable():
            return reason
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            return "vLLM's build for this instruction set has no cpu_gemm_wna16"
        return None

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        fits = weights.K % W4_GROUP == 0 and weights.N % 32 == 0
        if weights.dtype != torch.bfloat16 or not fits:
            return []
        return [Mode("w4a16", "bf16", 1e-2, 4 + 16 / W4_GROUP)]

    @override
    def load_all(self, weights: Weights, copies: int) -> list[Layer]:
        from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
        from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
            MPLinearLayerConfig,
        )
        from vllm.model_executor.layers.quantization.utils.quant_utils import (
            pack_quantized_values_into_int32,
        )
        from vllm.scalar_type import scalar_types

        shape = (weights.K, weights.N)
        config = MPLinearLayerConfig(
            full_weight_shape=shape,
            partition_weight_shape=shape,
            weight_type=scalar_types.uint4b8,
            act_type=weights.dtype,
            group_size=W4_GROUP,
            zero_points=False,
        )
        layer: Any = torch.nn.Module()
        codes = weights.signs(torch.int32) * 4 + 8  # 4 and not 7: the scale stays a power of two
        layer.codes = _frozen(
            pack_quantized_values_into_int32(codes, scalar_types.uint4b8, packed_dim=1)
        )
        layer.codes.input_dim, layer.codes.output_dim, layer.codes.packed_dim = 1, 0, 1
        groups = weights.K // W4_GROUP
        layer.scales = _frozen(torch.full((weights.N, groups), weights.scale / 4))
        layer.scales.output_dim = 0
        layer.zeros = layer.bias = None
        kernel = choose_mp_linear_kernel(config)(config, "codes", "scales", "zeros")
        kernel.process_weights_after_loading(layer)
        # Its loader is slow, and leaves nothing but tensors.
        layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
        return [partial(kernel.apply_weights, layer) for layer in layers]


def _frozen(tensor: torch.Tensor) -> Any:
    return torch.nn.Parameter(tensor, requires_grad=False)
