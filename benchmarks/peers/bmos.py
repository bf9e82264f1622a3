"""This project's layer, called as vLLM's plugin calls it: one op with everything in it."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from typing_extensions import override

import vllm_bmos.ops
from peers.base import SCALE_DTYPE, Loaded, LoadedLayers, Mode, Peer, Weights
from vllm_bmos.kernels import Kernel, LinearConfig, choose_kernel
from vllm_bmos.kernels.cpu import MODE_ENV

# The rounding of y is part of the error; on a GPU so are those of the gates and scales, which the
# GPU kernels round where the authors' layer does.
EXACT_TOLERANCE = {torch.bfloat16: 1.8e-3, torch.float16: 3e-4, torch.float32: 2e-6}
GPU_TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}


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
        if kernel.name != "cpu":
            # For many tokens a GPU's products are rounded to x's dtype, as those of a dense layer.
            return [Mode("default", "bf16", GPU_TOLERANCE[weights.dtype], 1)]
        default = Mode("default", "int8", 2e-3, 1)
        exact = Mode("exact", "int8", EXACT_TOLERANCE[weights.dtype], 1)
        return [default, exact, Mode("int8", "int8", 2e-2, 1)]

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


def call_overhead_us(E: int) -> float | None:
    """Median of a call without tokens: the dispatch from Python down to the kernel and back.

    None where the kernel is not the CPU's, whose calls return only when the work is done.
    """
    weights = Weights.random(256, 192, torch.bfloat16, "cpu")
    kernel = choose_kernel(_config(weights, E))
    if kernel.name != "cpu":
        return None
    layer, x = _layer(kernel, weights, _config(weights, E)), weights.activations(1)[:0]
    samples = []
    for _ in range(2000):
        begin = time.perf_counter_ns()
        layer(x)
        samples.append((time.perf_counter_ns() - begin) / 1e3)
    return round(statistics.median(samples), 2)


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
    """Set VLLM_BMOS_CPU_MODE; the CPU kernel reads it when it prepares a layer."""
    before = os.environ.get(MODE_ENV)
    os.environ[MODE_ENV] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[MODE_ENV]
        else:
            os.environ[MODE_ENV] = before
