"""The layer on a CPU: csrc/, in one call per layer.

The activations x * s_in are quantized for each token, in one of three modes. A layer keeps the
mode that VLLM_BMOS_CPU_MODE names when it is prepared; unset, a float32 layer gets `exact`, since
who serves in float32 asks for its digits, and every other layer `default`:

    default   16 bits, of which each group of 16 activations keeps 14: the error is a third of the
              rounding of a bfloat16 result, and no outlier channel is clipped
    exact     31 bits: as good as fp32 arithmetic, at half the speed
    int8      8 bits: twice the speed for many tokens

Everything behind that is exact integer arithmetic and fp32 operations in one fixed order. So a
row's result has the same bits in every batch, on every number of threads and instruction set.
docs/CPU_KERNELS.md tells how.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from typing_extensions import override

from vllm_bmos.checkpoint.signs import check_width
from vllm_bmos.kernels import large_pages, torch_op
from vllm_bmos.kernels.base import Kernel, LinearConfig, LinearTensors

__all__ = [
    "ISA_ENV",
    "LIBRARY_ENV",
    "MODE_ENV",
    "CpuKernel",
    "dense",
    "isa",
    "isas",
    "library",
    "mode",
]

ISA_ENV = "VLLM_BMOS_CPU_ISA"
MODE_ENV = "VLLM_BMOS_CPU_MODE"
LIBRARY_ENV = "VLLM_BMOS_CPU_LIBRARY"

# The enums of csrc/bmos.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
DENSE_DTYPES = {**DTYPES, torch.int8: 3}
MODES = {"int8": 1, "default": 2, "exact": 4}
SHAPE = 2  # BMOS_SHAPE
ABI = 2  # BMOS_ABI
MAX_K = 65536  # kMaxK of csrc/kernels.h

# Another build of the library, with sanitizers, say, may be named.
LIBRARY = Path(os.environ.get(LIBRARY_ENV) or Path(__file__).with_name("libbmos_cpu.so"))


class CpuKernel(Kernel):
    """AMX, AVX-512, AVX2 or portable C++, whichever is the best that the machine runs."""

    name = "cpu"

    @override
    def can_run(self, config: LinearConfig) -> tuple[bool, str]:
        if config.device != "cpu":
            return False, "runs on the CPU only"
        if config.dtype not in DTYPES or config.scale_dtype not in DTYPES:
            return False, (
                f"has no path for {config.dtype} activations and {config.scale_dtype} scales"
            )
        if config.K > MAX_K:
            return False, f"K={config.K} is more than {MAX_K}, whose sums fit 32 bits"
        try:
            library()
        except OSError as error:
            return False, (
                f"its library cannot be loaded ({error}); install a C++ compiler, then vllm-bmos "
                "again"
            )
        return True, f"{isa()}, mode {mode(config.dtype)}, {torch.get_num_threads()} threads"

    @override
    def prepare(self, tensors: LinearTensors, config: LinearConfig) -> LinearTensors:
        """Re-lay the signs; the scales and the router stay as the checkpoint has them.

        All lie side by side on large pages, which makes cold weights a fifth faster.
        """
        weight, *scales = tensors.in_order()
        *stack, N, width = weight.shape
        packed = large_pages.empty((*stack, _packed_bytes(config)), torch.uint8)
        for signs, layer in zip(
            weight.reshape(-1, N, width), packed.view(-1, packed.shape[-1]), strict=True
        ):
            _pack(signs, config, layer)
        return LinearTensors(packed, *map(_moved, scales))

    @override
    def prepare_stack(self, tensors: LinearTensors, config: LinearConfig) -> LinearTensors:
        # At once: what a layer takes of a large page is given back only with the whole page.
        return self.prepare(tensors, config)

    @override
    def router_logits(
        self, x: torch.Tensor, router_weight: torch.Tensor, shards: int
    ) -> torch.Tensor:
        rows = router_weight.reshape(-1, router_weight.shape[-1])
        return dense(x, rows).view(len(x), shards, router_weight.shape[1])

    @override
    def linear(
        self,
        x: torch.Tensor,
        logits: torch.Tensor | None,
        tensors: LinearTensors,
        bias: torch.Tensor | None,
        shard_sizes: list[int],
    ) -> torch.Tensor:
        x = x.contiguous()
        if logits is not None:
            logits = logits.float().contiguous()
        if bias is not None:
            bias = bias.contiguous()
        M, K = x.shape
        N = sum(shard_sizes)
        s_in = tensors.in_channel_scale
        S, E = s_in.shape[:2]
        shapes = [(S, E, K), (E, N), (S, E, K)]
        _, *scales = tensors.in_order()
        if (
            [scale.shape for scale in scales] != shapes
            or {scale.dtype for scale in scales} != {s_in.dtype}
            or (logits is not None and logits.shape != (M, S, E))
            or (bias is not None and bias.shape != (N,))
        ):
            _check(SHAPE)
        y = x.new_empty((M, N))
        status = library().bmos_linear(
            x.data_ptr(),
            DTYPES[x.dtype],
            M,
            K,
            None if logits is None else logits.data_ptr(),
            tensors.weight.data_ptr(),
            tensors.in_channel_scale.data_ptr(),
            tensors.out_channel_scale.data_ptr(),
            tensors.router_weight.data_ptr(),
            DTYPES[s_in.dtype],
            S,
            E,
            None if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPES[bias.dtype],
            y.data_ptr(),
            N,
            torch.get_num_threads(),
        )
        _check(status)
        return y


def dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x[M,K] @ weight[N,K].T with sums in fp32: [M,N] float32.

    Weights of 16 and 8 bits are read as they are; each row of x has the same bits in every batch.

    Args:
        x: float32, float16 or bfloat16.
        weight: of these dtypes or int8.
    """
    x, weight = x.contiguous(), weight.contiguous()
    (M, K), N = x.shape, len(weight)
    if weight.shape != (N, K):
        raise ValueError(f"expected weights of {K} inputs for x, found {tuple(weight.shape)}.")
    y = torch.empty((M, N), dtype=torch.float32)
    status = library().bmos_dense(
        x.data_ptr(),
        DTYPES[x.dtype],
        M,
        K,
        weight.data_ptr(),
        DENSE_DTYPES[weight.dtype],
        N,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status)
    return y


def _packed_bytes(config: LinearConfig) -> int:
    shards = len(config.shard_sizes)
    sizes = (ctypes.c_int64 * shards)(*config.shard_sizes)
    size = int(library().bmos_packed_bytes(config.K, sizes, shards))
    if size < 0:
        raise ValueError(f"the CPU kernel of BinaryMoS has no layout for {config}.")
    return size


def _pack(signs: torch.Tensor, config: LinearConfig, packed: torch.Tensor) -> None:
    """Re-lay the checkpoint's signs [N, ceil(K/8)] into `packed`."""
    check_width(signs, config.K)
    if len(signs) != config.N:
        raise ValueError(f"expected signs of {config.N} outputs, found {len(signs)}.")
    signs, shards = signs.contiguous(), len(config.shard_sizes)
    bmos = library()
    torch_op.register(bmos)
    status = bmos.bmos_pack(
        signs.data_ptr(),
        config.K,
        (ctypes.c_int64 * shards)(*config.shard_sizes),
        shards,
        config.E,
        DTYPES[config.scale_dtype],
        MODES[mode(config.dtype)],
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status)


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    return large_pages.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def mode(dtype: torch.dtype) -> str:
    """The mode that VLLM_BMOS_CPU_MODE names, else "exact" for float32 and "default" for the rest.

    Raises:
        ValueError: if there is no such mode.
    """
    name = os.environ.get(MODE_ENV) or ("exact" if dtype == torch.float32 else "default")
    if name not in MODES:
        raise ValueError(f"{MODE_ENV}={name}: unknown mode; the modes are {', '.join(MODES)}.")
    return name


@cache
def library() -> ctypes.CDLL:
    """csrc/'s library, on the best instruction set or the one that VLLM_BMOS_CPU_ISA names.

    It finds its threads, those of torch's OpenMP runtime, in the process.

    Raises:
        OSError: if the library was not built, or the process has no such runtime.
        ValueError: if the machine or the build does not have that instruction set.
    """
    bmos = ctypes.CDLL(str(LIBRARY))
    if not hasattr(bmos, "bmos_abi") or bmos.bmos_abi() != ABI:
        raise OSError(f"{LIBRARY} was built from another version of csrc/")
    number, size, pointer, text = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    bmos.bmos_isas.argtypes, bmos.bmos_isas.restype = [], text
    bmos.bmos_isa.argtypes, bmos.bmos_isa.restype = [], text
    bmos.bmos_use_isa.argtypes = [text]
    bmos.bmos_status.argtypes, bmos.bmos_status.restype = [number], text
    bmos.bmos_packed_bytes.argtypes = [size, pointer, size]
    bmos.bmos_packed_bytes.restype = size
    bmos.bmos_pack.argtypes = [
        *(pointer, size, pointer, size, size, number, number, pointer, number)
    ]
    bmos.bmos_dense.argtypes = [
        *(pointer, number, size, size, pointer, number, size, pointer, number)
    ]
    bmos.bmos_linear.argtypes = [
        *(pointer, number, size, size),
        *(pointer, pointer, pointer, pointer, pointer),
        *(number, size, size, pointer, number, pointer, size, number),
    ]
    name = os.environ.get(ISA_ENV)
    if name and bmos.bmos_use_isa(name.encode()):
        raise ValueError(
            f"{ISA_ENV}={name}: this machine and build have {bmos.bmos_isas().decode()}. Unset "
            "it to use the best of them."
        )
    return bmos


def isas() -> list[str]:
    """The instruction sets that the library has and this machine runs, best first."""
    return str(library().bmos_isas().decode()).split()


def isa() -> str:
    """The instruction set in use."""
    return str(library().bmos_isa().decode())


def _check(status: int) -> None:
    if status:
        why = library().bmos_status(status).decode()
        raise ValueError(f"the CPU kernel of BinaryMoS cannot run this layer: {why}.")
