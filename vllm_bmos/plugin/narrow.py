"""Products with dense weights of 16 or 8 bits, for lm_head, where torch has no fast ones.

Up to AVX2 neither oneDNN nor torch has a fast product of bfloat16 or float16: for 16 tokens a 7B
model's lm_head took more than a third of the time of all its 1-bit layers. For few tokens the
library of the 1-bit layers multiplies, in float32, by weights as they are; for many, weights are
widened in parts that stay in the caches, and torch multiplies.
"""

from functools import cache

import torch
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform

from vllm_bmos.kernels import cpu

logger = init_logger(__name__)

SLOW = ("DEFAULT", "AVX2")  # what torch calls processors without AVX-512
FEW = 24  # tokens below which widening the weights takes longer
ROWS = 512  # of the weight at a time: in float32 they stay in the caches, 8 MB for K = 4096


def lacks_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a 16-bit dtype far slower than float32's."""
    return (
        current_platform.is_cpu()
        and current_platform.get_cpu_architecture() == CpuArchEnum.X86
        and dtype.itemsize == 2
        and torch.backends.cpu.get_cpu_capability() in SLOW
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x[...,K] @ (weight[N,K] * scale[N,1]).T + bias[N] in x's dtype.

    Fewer than FEW tokens are multiplied in float32; more in float32 or, where the processor has
    products of x's dtype, in that, to which scaled weights are rounded.
    """
    flat = x.reshape(-1, x.shape[-1])
    few = len(flat) < FEW
    if few and has_library():
        wide = cpu.dense(flat, weight)
        y = (wide if scale is None else wide.mul_(scale)).to(x.dtype)
    elif few and scale is None:
        y = torch.nn.functional.linear(flat, weight)  # widening the weights takes longer
    else:
        y = in_parts(flat, weight, scale)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(weight))


def in_parts(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x[M,K] @ (weight[N,K] * scale[N,1]).T in x's dtype, ROWS of the weight at a time."""
    wide = x.float() if lacks_products(x.dtype) else x
    y = x.new_empty(len(x), len(weight))
    part = wide.new_empty(ROWS, x.shape[1])
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        block = part[: len(weight[rows])].copy_(weight[rows])
        if scale is not None:  # before the product: its sums may be too large for float16 without
            block *= scale[rows].unsqueeze(1)
        y[:, rows] = wide @ block.T
    return y


@cache
def has_library() -> bool:
    """Whether the library of the CPU kernel is there; the log says why not."""
    try:
        cpu.library()
    except OSError as error:
        logger.warning(
            "BinaryMoS: lm_head is slow without the CPU kernel's library (%s); install a C++ "
            "compiler, then vllm-bmos again.",
            error,
        )
        return False
    return True
