"""The CPU kernel as C++ in torch's dispatcher: a call of `ops.linear` runs no Python.

Between two cold layers the interpreter's own code and data are cold as well, and a call through
Python costs up to 50 microseconds, as much as a small layer. csrc/torch_op.cpp is called by the
dispatcher itself, over torch's stable C interface. Where torch does not have it (before 2.10),
calls go through Python, with the same results.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

__all__ = ["register"]

logger = logging.getLogger(__name__)

# The members of BmosTorch in csrc/torch_op.h.
FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_dtype",
    "aoti_torch_is_contiguous",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_get_num_threads",
)
VERSION = 2 << 56 | 10 << 48  # the version of torch whose conventions csrc/torch_op.cpp follows


@cache
def register(bmos: ctypes.CDLL) -> bool:
    """Make bmos_torch_linear the CPU kernel of `vllm_bmos::cpu_linear`; say whether torch can."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in FUNCTIONS]
        begin, implement = library.aoti_torch_library_init_impl, library.torch_library_impl
    except (AttributeError, OSError) as error:
        logger.info("BinaryMoS: layers are called through Python: %s", error)
        return False
    bmos.bmos_torch_use((ctypes.c_void_p * len(functions))(*functions))
    handle = ctypes.c_void_p()
    kernel = ctypes.cast(bmos.bmos_torch_linear, ctypes.c_void_p)
    status = begin(b"vllm_bmos", b"CPU", __file__.encode(), 0, ctypes.byref(handle))
    if status == 0:
        status = implement(handle, b"cpu_linear", kernel, ctypes.c_uint64(VERSION))
    if status != 0:
        raise RuntimeError(
            f"torch {torch.__version__} refused the CPU kernel of vllm_bmos::cpu_linear (status "
            f"{status}). Report this to vllm-bmos."
        )
    return True
