"""What this machine can do at most, measured in the same run as what is compared with it."""

import time
from collections.abc import Callable

import torch

from vllm_bmos.kernels import large_pages

READ_BYTES = {"cpu": 2**30, "cuda": 2**32}
MATRIX, SMALL_MATRIX = {"cpu": 2048, "cuda": 8192}, 512
PATIENCE = 0.5  # seconds for one product; the small matrix has to do where the other takes longer
REPEATS = 9  # the best one counts: a limit is what the machine does undisturbed


def measure_limits(device: str) -> dict[str, float]:
    """Memory read rate in GB/s and arithmetic rates in GFLOP/s (GOP/s for int8).

    The read rate is the better of a sum and a dot product over 1 GiB (a GPU: 4 GiB); an arithmetic
    rate is that of the vendor library's square matrix product, so neither is a data-sheet figure.
    The matrices are of size 2048 (a GPU: 8192), or 512 where the library has no fast path for the
    dtype on this machine.
    """
    return {"read_gbs": _read_rate(device), **_arithmetic_rates(device)}


def _read_rate(device: str) -> float:
    if device == "cpu":
        # Huge pages, so that the limit is the memory's and not the TLB's.
        values = large_pages.empty((READ_BYTES[device] // 4,), torch.float32).fill_(1.0)
    else:
        values = torch.ones(READ_BYTES[device] // 4, dtype=torch.float32, device=device)
    half = values.numel() // 2
    seconds = min(
        _best_seconds(lambda: values.sum(), device),
        _best_seconds(lambda: torch.dot(values[:half], values[half:]), device),
    )
    return round(values.nbytes / seconds / 1e9, 1)


def _arithmetic_rates(device: str) -> dict[str, float]:
    products: dict[str, Callable[[int], Callable[[], torch.Tensor]]] = {
        "fp32_gflops": lambda size: _square(size, torch.float32, device),
        "bf16_gflops": lambda size: _square(size, torch.bfloat16, device),
        "int8_gops": lambda size: _int8_product(size, device),
    }
    return {name: _rate(product, device) for name, product in products.items()}


def _rate(product: Callable[[int], Callable[[], torch.Tensor]], device: str) -> float:
    """GFLOP/s of a product of square matrices."""
    small = _best_seconds(product(SMALL_MATRIX), device)
    size, seconds, large = SMALL_MATRIX, small, MATRIX[device]
    if small * (large / SMALL_MATRIX) ** 3 < PATIENCE:
        size, seconds = large, _best_seconds(product(large), device)
    return round(2 * size**3 / seconds / 1e9, 1)


def _square(size: int, dtype: torch.dtype, device: str) -> Callable[[], torch.Tensor]:
    a = torch.randn(size, size, device=device).to(dtype)
    return lambda: a @ a


def _int8_product(size: int, device: str) -> Callable[[], torch.Tensor]:
    a = torch.randint(0, 128, (size, size), dtype=torch.int8, device=device)
    if device != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return lambda: torch._int_mm(a, a.T)
    # oneDNN is twice as fast on a prepacked weight as `_int_mm`. Without VNNI it has a fast path to
    # float32 only.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    dtype = torch.bfloat16 if known.get("avx512_vnni") else torch.float32
    weight = torch.ops.onednn.qlinear_prepack(a, [size, size])
    scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    x, x_scale, x_zero = a.to(torch.uint8), torch.tensor(1.0), torch.tensor(0)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        *(x, x_scale, x_zero, weight, scales, zeros, None),
        *(1.0, 0, dtype, "none", [], ""),
    )


def _best_seconds(call: Callable[[], torch.Tensor], device: str) -> float:
    call()
    timed = _cuda_seconds if device == "cuda" else _cpu_seconds
    return min(timed(call) for _ in range(REPEATS))


def _cpu_seconds(call: Callable[[], torch.Tensor]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _cuda_seconds(call: Callable[[], torch.Tensor]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
