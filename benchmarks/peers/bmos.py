"""This project's layer, called as vLLM's plugin calls it: one op with everything in it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from typing_extensions import override

import vllm_bmos.ops
from peers.base import SCALE_DTYPE, Loaded, LoadedLayers, Mode, Peer, Weights
from vllm_bmos.kernels import Kernel, LinearConfig, choose_kernel

CPU_MODE_ENV = "VLLM_BMOS_CPU_MODE"
CPU_MODES = (
    Mode("default", "int8", 2e-3, 1),
    Mode("exact", "bf16", 1.8e-3, 1),
    Mode("int8", "int8", 2e-2, 1),
)


class Bmos(Peer):
    """The kernel that `choose_kernel` picks, in every mode it has."""

    name = "vllm_bmos"
    devices = ("cpu", "cuda")

    def __init__(self, E: int) -> None:
        self.E = E

    @override
    def unavailable(self) -> str | None:
        return None

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        kernel = choose_kernel(_config(weights, self.E))
        return list(CPU_MODES) if kernel.name == "cpu" else [CPU_MODES[0]]

    @override
    def experts(self, mode: Mode) -> tuple[int, ...]:
        # E = 1 is OneBit: beside E it shows what the mixing of scales costs.
        return (self.E, 1) if mode.name == "default" and self.E != 1 else (self.E,)

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        config = _config(weights, E)
        with _cpu_mode(mode.name):
            kernel = choose_kernel(config)
            return LoadedLayers([_layer(kernel, weights, config) for _ in range(copies)])


def _config(weights: Weights, E: int) -> LinearConfig:
    return LinearConfig(
        K=weights.K,
        shard_sizes=(weights.N,),
        E=E,
        dtype=weights.dtype,
        scale_dtype=SCALE_DTYPE,
        device=weights.device,
    )


def _layer(
    kernel: Kernel, weights: Weights, config: LinearConfig
) -> Callable[[torch.Tensor], torch.Tensor]:
    tensors = kernel.prepare(weights.layer(config.E), config)
    shard_sizes = list(config.shard_sizes)
    return lambda x: vllm_bmos.ops.linear(
        x,
        None,
        tensors.weight,
        tensors.in_channel_scale,
        tensors.out_channel_scale,
        tensors.router_weight,
        None,
        shard_sizes,
        kernel.name,
    )


@contextmanager
def _cpu_mode(name: str) -> Iterator[None]:
    before = os.environ.get(CPU_MODE_ENV)
    os.environ[CPU_MODE_ENV] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[CPU_MODE_ENV]
        else:
            os.environ[CPU_MODE_ENV] = before
