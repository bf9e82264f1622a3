"""The kernels, best first, and the one place where one of them is chosen."""

import logging
import os
from functools import cache

from vllm_bmos.kernels.base import Kernel, LinearConfig, LinearTensors
from vllm_bmos.kernels.cpu import ISA_ENV, LIBRARY_ENV, MODE_ENV, CpuKernel
from vllm_bmos.kernels.dequant import DequantKernel
from vllm_bmos.kernels.reference import ReferenceKernel
from vllm_bmos.kernels.triton import TritonKernel
from vllm_bmos.kernels.triton.configs import CONFIGS_ENV
from vllm_bmos.kernels.triton.selfcheck import SELFCHECK_ENV

__all__ = [
    "ENVIRONMENT",
    "KERNEL_ENV",
    "Kernel",
    "LinearConfig",
    "LinearTensors",
    "choose_kernel",
    "kernels",
]

logger = logging.getLogger(__name__)

KERNEL_ENV = "VLLM_BMOS_KERNEL"
ENVIRONMENT = (KERNEL_ENV, ISA_ENV, MODE_ENV, LIBRARY_ENV, CONFIGS_ENV, SELFCHECK_ENV)


@cache
def kernels() -> dict[str, Kernel]:
    """Every kernel by name, in the order of preference."""
    found: list[Kernel] = [TritonKernel(), CpuKernel(), DequantKernel(), ReferenceKernel()]
    return {kernel.name: kernel for kernel in found}


def choose_kernel(config: LinearConfig) -> Kernel:
    """The first kernel that can run this layer, or the one that VLLM_BMOS_KERNEL forces.

    The choice and the reason why every better kernel was passed over are logged once.

    Raises:
        ValueError: if the forced kernel is unknown or cannot run the layer.
    """
    forced = os.environ.get(KERNEL_ENV)
    if forced:
        if forced not in kernels():
            raise ValueError(
                f"{KERNEL_ENV}={forced}: unknown kernel; the kernels are {', '.join(kernels())}."
            )
        kernel = kernels()[forced]
        able, reason = kernel.can_run(config)
        if not able:
            raise ValueError(
                f"{KERNEL_ENV}={forced}: this kernel cannot run {config}: {reason}. Unset "
                f"{KERNEL_ENV} to let vllm-bmos choose."
            )
        _log_once(f"kernel {forced} for {config.dtype} on {config.device} (forced: {reason})")
        return kernel
    passed: list[str] = []
    for kernel in kernels().values():
        able, reason = kernel.can_run(config)
        if able:
            why_not = f"; not chosen: {'; '.join(passed)}" if passed else ""
            _log_once(
                f"kernel {kernel.name} for {config.dtype} on {config.device} ({reason}){why_not}"
            )
            return kernel
        passed.append(f"{kernel.name}: {reason}")
    raise AssertionError("the reference kernel runs everything")


@cache
def _log_once(message: str) -> None:
    logger.info("BinaryMoS: %s", message)
