"""What this machine can do at most, measured in the same run as what is compared with it."""

import time
from collections.abc import Callable

import torch

from vllm_bmos.kernels import large_pages

READ_BYTES = 2**30
MATRIX = 2048
REPEATS = 9  # the best one counts: a limit is what the machine does undisturbed


def measure_limits(device: str) -> dict[str, float]:
    """Memory read rate in GB/s and arithmetic rates in GFLOP/s (GOP/s for int8).

    The read rate is the better of a sum and a dot product over 1 GiB; an arithmetic rate is that of
    the vendor library's square matrix product of size 2048, so neither is a data-sheet figure.
    """
    return {"read_gbs": _read_rate(device), **_arithmetic_rates(device)}


def _read_rate(device: str) -> float:
    if device == "cpu":
        # Huge pages, so that the limit is the memory's and not the TLB's.
        values = large_pages.empty((READ_BYTES // 4,), torch.float32).fill_(1.0)
    else:
        values = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    half = values.numel() // 2
    seconds = min(
        _best_seconds(lambda: values.sum(), device),
        _best_seconds(lambda: torch.dot(values[:half], values[half:]), device),
    )
    return round(READ_BYTES / seconds / 1e9, 1)


def _arithmetic_rates(device: str) -> dict[str, float]:
    a = torch.randn(MATRIX, MATRIX, device=device)
    a16 = a.to(torch.bfloat16)
    products: dict[str, Callable[[], torch.Tensor]] = {
        "fp32_gflops": lambda: a @ a,
        "bf16_gflops": lambda: a16 @ a16,
        "int8_gops": _int8_product(device),
    }
    operations = 2 * MATRIX**3
    return {
        name: round(operations / _best_seconds(product, device) / 1e9, 1)
        for name, product in products.items()
    }


def _int8_product(device: str) -> Callable[[], torch.Tensor]:
    a = torch.randint(0, 128, (MATRIX, MATRIX), dtype=torch.int8, device=device)
    if device != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return lambda: torch._int_mm(a, a.T)
    # oneDNN is twice as fast on a prepacked weight as `_int_mm`.
    weight = torch.ops.onednn.qlinear_prepack(a, [MATRIX, MATRIX])
    scales, zeros = torch.ones(MATRIX), torch.zeros(MATRIX, dtype=torch.int64)
    x, x_scale, x_zero = a.to(torch.uint8), torch.tensor(1.0), torch.tensor(0)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        *(x, x_scale, x_zero, weight, scales, zeros, None),
        *(1.0, 0, torch.bfloat16, "none", [], ""),
    )


def _best_seconds(call: Callable[[], torch.Tensor], device: str) -> float:
    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    finish()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - begin)
    return min(times)
