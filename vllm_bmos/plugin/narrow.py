"""Products with 16-bit weights on x86 processors that have no instructions for them.

Up to AVX2 neither oneDNN nor torch has a fast product of bfloat16 or float16. A few tokens wait for
the memory all the same, but for many torch's own takes up to seven times as long as converting the
weights and multiplying in float32: for 16 tokens a 7B model's lm_head took more than a third of the
time of all its 1-bit layers.
"""

import torch
from vllm.platforms import CpuArchEnum, current_platform

SLOW = ("DEFAULT", "AVX2")  # what torch calls processors without AVX-512
FEW = 10  # tokens below which converting the weights takes longer than torch's own product
ROWS = 512  # of the weight at a time: in float32 they stay in the caches, 8 MB for K = 4096


def lacks_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a 16-bit dtype far slower than float32's."""
    return (
        current_platform.is_cpu()
        and current_platform.get_cpu_architecture() == CpuArchEnum.X86
        and dtype.itemsize == 2
        and torch.backends.cpu.get_cpu_capability() in SLOW
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x[M,K] @ weight[N,K].T + bias[N] in x's dtype; for many tokens sums are float32's."""
    if x.ndim != 2 or len(x) < FEW:
        return torch.nn.functional.linear(x, weight, bias)
    return linear_in_parts(x, weight, bias)


def linear_in_parts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x[...,K] @ (weight[N,K] * scale[N,1]).T + bias[N] in x's dtype, ROWS of the weight at a time.

    The weight may have any dtype whose values x's dtype can hold.
    """
    wide = x.reshape(-1, x.shape[-1])
    if lacks_products(x.dtype):
        wide = wide.float()
    y = x.new_empty(len(wide), len(weight))
    part = wide.new_empty(ROWS, x.shape[-1])
    if scale is not None:
        scale = scale.to(torch.promote_types(scale.dtype, part.dtype))
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        block = part[: len(weight[rows])].copy_(weight[rows])
        if scale is not None:  # before the product: its sums may be too large for float16 without
            block *= scale[rows].unsqueeze(1)
        y[:, rows] = wide @ block.T
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(weight))
