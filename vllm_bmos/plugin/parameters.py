"""A packed layer's tensors as parameters of vLLM's layer: made, read and replaced in one place.

A layer of vLLM may hold several packed layers, each by a prefix of its own, and each of them may be
a stack [X, ...] of layers of one shape.
"""

import math
import mmap
from collections.abc import Callable

import torch
from vllm.model_executor.utils import replace_parameter

from vllm_bmos.checkpoint.format import OUT_SCALE, REQUIRED, WEIGHT, packed_width
from vllm_bmos.kernels import LinearConfig, LinearTensors

N_DIMENSION = {WEIGHT: 0, OUT_SCALE: 1}


def empty_tensors(config: LinearConfig, *stack: int) -> LinearTensors:
    """Uninitialised tensors of a layer in the checkpoint's layout, or of a stack of such layers."""
    N, K, E, S = config.N, config.K, config.E, len(config.shard_sizes)
    return LinearTensors(
        weight=_empty((*stack, N, packed_width(K)), torch.uint8),
        in_channel_scale=_empty((*stack, S, E, K), config.scale_dtype),
        out_channel_scale=_empty((*stack, E, N), config.scale_dtype),
        router_weight=_empty((*stack, S, E, K), config.scale_dtype),
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the default device.

    On a CPU it is a memory map of its own, which goes back to the system with the tensor. Kernels
    replace these tensors after loading, and malloc would keep what they leave: a second model.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.get_default_device().type != "cpu" or size == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def register_tensors(
    layer: torch.nn.Module,
    tensors: LinearTensors,
    weight_loader: Callable[..., object],
    prefix: str = "",
) -> None:
    """Give the layer the tensors as parameters; each knows its name in the format.

    Those with rows or columns of N say which dimension it is: vLLM's Falcon asks, to bring q, k
    and v of all heads, which alternate on the disk, in the order that it serves them in.
    """
    for suffix, tensor in zip(REQUIRED, tensors.in_order(), strict=True):
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        parameter.bmos_suffix = suffix  # type: ignore[attr-defined]
        parameter.weight_loader = weight_loader  # type: ignore[attr-defined]
        if suffix in N_DIMENSION and not prefix:
            parameter.output_dim = N_DIMENSION[suffix]  # type: ignore[attr-defined]
        layer.register_parameter(prefix + suffix, parameter)


def registered_tensors(layer: torch.nn.Module, prefix: str = "") -> LinearTensors:
    """What the layer holds now."""
    return LinearTensors(*(getattr(layer, prefix + suffix).data for suffix in REQUIRED))


def replace_tensors(layer: torch.nn.Module, tensors: LinearTensors, prefix: str = "") -> None:
    """Put others in their place, of another layout, say."""
    for suffix, tensor in zip(REQUIRED, tensors.in_order(), strict=True):
        replace_parameter(layer, prefix + suffix, tensor)
