"""The few functions of llama.cpp's ggml that a matrix product needs, through ctypes.

The libraries are those that the `llama-cpp-python` package brings. Weights go into the buffer type
that llama.cpp itself would pick: the first of the CPU's special ones (repacked, AMX) that supports
the product, else a plain one.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

F32 = 0
TYPES = {"q4_0": 2, "tq2_0": 35, "q1_0": 41}  # enum ggml_type
GRAPH_OVERHEAD = 2**20
TENSOR_OVERHEAD = 1024

_POINTER = ctypes.c_void_p
_SIGNATURES = {
    "ggml_log_set": (None, [_POINTER, _POINTER]),
    "ggml_init": (_POINTER, None),
    "ggml_free": (None, [_POINTER]),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, _POINTER, _POINTER, *[ctypes.c_int64] * 3, _POINTER],
    ),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph_custom": (_POINTER, [_POINTER, ctypes.c_size_t, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_buft_alloc_buffer": (_POINTER, [_POINTER, ctypes.c_size_t]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_graph_compute": (ctypes.c_int, [_POINTER, _POINTER]),
    "ggml_backend_reg_dev_get": (_POINTER, [_POINTER, ctypes.c_size_t]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_POINTER, _POINTER]),
    "ggml_backend_cpu_buffer_type": (_POINTER, []),
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_reg": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, ctypes.c_int]),
}
_SILENT_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)(lambda *_: None)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", _POINTER),
        ("no_alloc", ctypes.c_bool),
    )


class _TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor."""

    _fields_ = (("type", ctypes.c_int), ("buffer", _POINTER))


class Ggml:
    """ggml's functions as attributes, and its CPU backend.

    Raises:
        ImportError: if llama-cpp-python is missing or its ggml lacks one of the types.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = Path(spec.origin).parent / "lib"
        libraries = []
        for name in ("libggml-base.so", "libggml-cpu.so"):
            if not (folder / name).exists():
                raise ImportError(f"llama-cpp-python brings no {name}")
            libraries.append(ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL))
        for name, (result, arguments) in _SIGNATURES.items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise ImportError(f"llama-cpp-python's ggml has no {name}")
            function.restype = result
            function.argtypes = [_InitParams] if arguments is None else arguments
            setattr(self, name, function)
        for name, number in TYPES.items():
            found = self.ggml_type_name(number)
            if found != name.encode():
                raise ImportError(f"llama-cpp-python's ggml calls type {number} {found!r}")
        self.ggml_log_set(_SILENT_LOG, None)
        self.backend = self.ggml_backend_cpu_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not one of the ggml functions loaded here")

    def context(self, tensors: int) -> int:
        """A ggml context that holds descriptions of tensors but no data."""
        size = tensors * TENSOR_OVERHEAD + GRAPH_OVERHEAD
        return self.ggml_init(_InitParams(size, None, True))

    def weight_buffer_type(self, ggml_type: int, K: int, N: int) -> int:
        """The buffer type that llama.cpp would put such a weight into."""
        registry = self.ggml_backend_cpu_reg()
        device = self.ggml_backend_reg_dev_get(registry, 0)
        address = self.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        extra_types = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(device)
        context = self.context(3)
        weight = self.ggml_new_tensor_2d(context, ggml_type, K, N)
        product = self.ggml_mul_mat(context, weight, self.ggml_new_tensor_2d(context, F32, K, 512))
        head = _TensorHead.from_address(weight)
        chosen = self.ggml_backend_cpu_buffer_type()
        index = 0
        while extra_types and extra_types[index]:
            head.buffer = self.ggml_backend_buft_alloc_buffer(extra_types[index], 0)
            supported = self.ggml_backend_dev_supports_op(device, product)
            self.ggml_backend_buffer_free(head.buffer)
            head.buffer = None
            if supported:
                chosen = extra_types[index]
                break
            index += 1
        self.ggml_free(context)
        return chosen

    def quantize(self, ggml_type: int, dense: torch.Tensor) -> torch.Tensor:
        """Quantize float32 [N, K] with ggml's own quantizer to uint8 [N, bytes of a row]."""
        N, K = dense.shape
        out = torch.empty(N, self.ggml_row_size(ggml_type, K), dtype=torch.uint8)
        self.ggml_quantize_chunk(ggml_type, dense.data_ptr(), out.data_ptr(), 0, N, K, None)
        return out


class Products:
    """A graph of matrix products of one x with several copies of a weight.

    Freed with the object; `weights` must outlive it.
    """

    def __init__(self, ggml: Ggml, weights: Sequence[int], x: torch.Tensor, N: int) -> None:
        self.ggml, self.shape = ggml, (x.shape[0], N)
        self.context = ggml.context(len(weights) + 1)
        inputs = ggml.ggml_new_tensor_2d(self.context, F32, x.shape[1], x.shape[0])
        self.graph = ggml.ggml_new_graph_custom(self.context, len(weights) + 1, False)
        for weight in weights:
            self.output = ggml.ggml_mul_mat(self.context, weight, inputs)
            ggml.ggml_build_forward_expand(self.graph, self.output)
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(
            self.context, ggml.ggml_backend_cpu_buffer_type()
        )
        x = x.float().contiguous()
        ggml.ggml_backend_tensor_set(inputs, x.data_ptr(), 0, x.nbytes)

    def __del__(self) -> None:
        self.ggml.ggml_backend_buffer_free(self.buffer)
        self.ggml.ggml_free(self.context)

    def run(self) -> "Products":
        """Compute every product."""
        status = self.ggml.ggml_backend_graph_compute(self.ggml.backend, self.graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self

    def result(self) -> torch.Tensor:
        """y[M, N] float32 of the last product."""
        y = torch.empty(self.shape, dtype=torch.float32)
        self.ggml.ggml_backend_tensor_get(self.output, y.data_ptr(), 0, y.nbytes)
        return y


@cache
def load_ggml() -> Ggml:
    """The libraries, loaded once.

    Raises:
        ImportError: see `Ggml`.
    """
    return Ggml()
