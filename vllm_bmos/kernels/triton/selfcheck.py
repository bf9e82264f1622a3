"""Try the Triton kernels on the GPU at hand before serving with them.

No test without a GPU can show that the kernels are right on silicon. So the first layer of each
shape is preceded by a synthetic layer of that shape: every tile of the table, the vendor-GEMM path
and the router run on it and are compared with dequantise + matmul in torch. The same calls compile
every variant that the shape needs, so that nothing compiles while serving.

VLLM_BMOS_SELFCHECK says what a failure does: "fallback" (the default) logs what differed and leaves
the layer to the next kernel, "error" raises, and "off" skips the check and the warm-up.
"""

import logging
import os
from collections.abc import Iterator
from functools import cache

import torch

from vllm_bmos.checkpoint.format import packed_width
from vllm_bmos.kernels.base import Kernel, LinearConfig, LinearTensors
from vllm_bmos.kernels.dequant import DequantKernel

logger = logging.getLogger(__name__)

SELFCHECK_ENV = "VLLM_BMOS_SELFCHECK"
MODES = ("fallback", "error", "off")
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
"""Largest error over largest output. Both kernels round at the same points, but sum in different
orders: an output, a product and a scale may each fall on the other side of an edge, by one unit."""


class SelfCheckError(RuntimeError):
    """A kernel gave a wrong answer on this device. The message says where and how wrong."""


@cache
def passes(kernel: Kernel, config: LinearConfig, tokens: tuple[int, ...]) -> str | None:
    """What is wrong with `kernel` on this device for such a layer, or None. Runs once a shape.

    Args:
        kernel: the kernel to try.
        config: the layer's shape and dtypes; the synthetic layer lies on `config.device`.
        tokens: the numbers of tokens to try, one for each variant of the kernel.

    Raises:
        SelfCheckError: if something is wrong and VLLM_BMOS_SELFCHECK=error.
        ValueError: if VLLM_BMOS_SELFCHECK has another value than it may.
    """
    mode = os.environ.get(SELFCHECK_ENV) or MODES[0]
    if mode not in MODES:
        raise ValueError(f"{SELFCHECK_ENV}={mode}: expected one of {', '.join(MODES)}")
    if mode == "off":
        logger.warning(
            "BinaryMoS: %s=off: the %s kernel is not checked on this device and compiles while "
            "serving",
            SELFCHECK_ENV,
            kernel.name,
        )
        return None
    try:
        wrong = next(_mismatches(kernel, config, tokens), None)
    except Exception as error:  # a broken compiler or driver is as good a reason as a wrong number
        if mode == "error":
            raise
        wrong = f"{type(error).__name__}: {error}"
    if wrong is None:
        return None
    message = f"self-check of the {kernel.name} kernel failed for {config}: {wrong}"
    if mode == "error":
        raise SelfCheckError(message)
    logger.error("BinaryMoS: %s. Falling back to another kernel.", message)
    return f"self-check failed: {wrong}"


def _mismatches(kernel: Kernel, config: LinearConfig, tokens: tuple[int, ...]) -> Iterator[str]:
    oracle = DequantKernel()
    tensors, bias = synthetic_layer(config)
    prepared = kernel.prepare(tensors, config)
    sizes = list(config.shard_sizes)
    for M in tokens:
        x = _random((M, config.K), config.dtype, config.device, seed=M).mul_(2).sub_(1)
        want_logits = oracle.router_logits(x, tensors.router_weight, len(sizes))
        logits = kernel.router_logits(x, prepared.router_weight, len(sizes))
        if wrong := _compare(logits, want_logits, TOLERANCE[config.dtype]):
            yield f"router_logits, M={M}: {wrong}"
        for given, added in ((None, bias), (want_logits, None)):
            want = oracle.linear(x, given, tensors, added, sizes)
            y = kernel.linear(x, given, prepared, added, sizes)
            if wrong := _compare(y, want, TOLERANCE[config.dtype]):
                yield f"linear, M={M}, {'own' if given is None else 'given'} logits: {wrong}"


def _compare(found: torch.Tensor, want: torch.Tensor, tolerance: float) -> str | None:
    if found.shape != want.shape or found.dtype != want.dtype:
        return f"expected {want.dtype} {list(want.shape)}, found {found.dtype} {list(found.shape)}"
    error = (found.double() - want.double()).abs()
    largest = want.double().abs().max()
    if bool((error <= tolerance * largest).all()):  # false for NaN
        return None
    index = int(error.nan_to_num(nan=torch.inf).argmax())
    position = [int(i) for i in torch.unravel_index(torch.tensor(index), want.shape)]
    return (
        f"at {position} expected {want.flatten()[index]:.6g}, found {found.flatten()[index]:.6g}; "
        f"the tolerance is {tolerance:g} of the largest output, {largest:.6g}"
    )


def synthetic_layer(config: LinearConfig) -> tuple[LinearTensors, torch.Tensor]:
    """A random layer of this shape in the checkpoint's layout, and a bias."""
    S, N, K, E = len(config.shard_sizes), config.N, config.K, config.E
    device, scale = config.device, config.scale_dtype
    generator = torch.Generator(device).manual_seed(N * K + E)
    weight = torch.randint(
        256, (N, packed_width(K)), dtype=torch.uint8, device=device, generator=generator
    )
    tensors = LinearTensors(
        weight=weight,
        in_channel_scale=_random((S, E, K), scale, device, seed=1).add_(0.5),
        out_channel_scale=_random((E, N), scale, device, seed=2).add_(0.5),
        router_weight=_random((S, E, K), scale, device, seed=3).sub_(0.5).mul_(4 * K**-0.5),
    )
    return tensors, _random((N,), config.dtype, device, seed=4)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int) -> torch.Tensor:
    """Uniform in [0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(shape, device=device, dtype=torch.float32, generator=generator).to(dtype)
