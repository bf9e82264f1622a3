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
    wide, y = x.float(), x.new_empty(len(x), len(weight))
    part = wide.new_empty(ROWS, x.shape[1])
    for rows, found in zip(weight.split(ROWS), y.split(ROWS, dim=1), strict=True):
        found.copy_(wide @ part[: len(rows)].copy_(rows).T)
    return y if bias is None else y.add_(bias)
