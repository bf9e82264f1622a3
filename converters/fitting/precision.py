"""Where a fit may round to bfloat16, and where the machine is slower for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from converters.fitting.distributed import has_gpu


def model_dtype() -> torch.dtype:
    """What whole models are run and trained in: bfloat16 where its products are fast, else float32.

    bfloat16 has float32's range. A processor without instructions for it (AVX-512 BF16, AMX, Arm's
    BF16) takes 6 to 140 times as long for its products as for float32's.
    """
    if has_gpu():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = any(there for name, there in known.items() if name.endswith("bf16"))
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products round their factors to bfloat16 where the CPU is faster so.

    Good enough for forward passes and for sums over many tokens, where the roundings average out;
    not for the solvers, whose matrices are ill-conditioned.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 has it
    if settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
