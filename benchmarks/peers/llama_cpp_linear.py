"""llama.cpp's matrix products: Q1_0, TQ2_0 and Q4_0 weights with activations in blocks of int8.

As in llama.cpp itself, one graph holds several products, so that its threads start once for all.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import cpu_info
from timing import Ring
from typing_extensions import override

from peers.base import Loaded, Mode, Peer, Weights
from peers.ggml import TYPES, Ggml, Products, load_ggml

QUANTIZED_BLOCK = 256  # K of TQ2_0 must be a multiple of it; of Q1_0 of 128, of Q4_0 of 32
BITS = {"q1_0": 1.125, "tq2_0": 2.0625, "q4_0": 4.5}
PRODUCTS_PER_GRAPH = 8
OUTPUT_BYTES = 2**30  # each product of each graph has an output of its own
# Processor flags, and ggml's names for what they allow.
GGML_FLAGS = {
    "avx": ("AVX",),
    "avx2": ("AVX2", "FMA", "F16C", "BMI2"),
    "avx_vnni": ("AVX_VNNI",),
    "avx512vl": ("AVX512",),
    "avx512_vnni": ("AVX512_VNNI",),
    "avx512vbmi": ("AVX512_VBMI",),
    "avx512_bf16": ("AVX512_BF16",),
}
SMALL_M = 16  # above it the start of the threads is nothing beside one product


class LlamaCpp(Peer):
    """`ggml_mul_mat` of the ggml that llama-cpp-python brings."""

    name = "llama_cpp"

    @override
    def unavailable(self) -> str | None:
        try:
            load_ggml()
        except (ImportError, OSError) as error:
            return str(error)
        # In a process of its own: a ggml built by gcc 12 with AMX dies of an illegal instruction.
        command = [sys.executable, "-m", __name__]
        probe = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True)
        if probe.returncode != 0:
            return (
                f"its ggml crashes on this machine (exit status {probe.returncode}); without AMX "
                f"it may not: CMAKE_ARGS='{without_amx()}' pip install --force-reinstall "
                "--no-deps --no-cache-dir llama-cpp-python"
            )
        return None

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        if weights.K % QUANTIZED_BLOCK:
            return []
        return [Mode(name, "int8", 2e-2, bits) for name, bits in BITS.items()]

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        return _LoadedGraphs(load_ggml(), weights, mode.name, copies)


def without_amx() -> str:
    """What CMake needs to build a ggml with all that this processor has but AMX."""
    flags = cpu_info().get("flags", "").split()
    names = [name for flag, group in GGML_FLAGS.items() if flag in flags for name in group]
    return " ".join(["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in names)])


class _LoadedGraphs(Loaded):
    def __init__(self, ggml: Ggml, weights: Weights, type_name: str, copies: int) -> None:
        self.ggml, self.N = ggml, weights.N
        number = TYPES[type_name]
        rows = quantized_rows(ggml, type_name, weights)
        self.context = ggml.context(copies)
        self.tensors = [
            ggml.ggml_new_tensor_2d(self.context, number, weights.K, weights.N)
            for _ in range(copies)
        ]
        buffer_type = ggml.weight_buffer_type(number, weights.K, weights.N)
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        for tensor in self.tensors:
            ggml.ggml_backend_tensor_set(tensor, rows.data_ptr(), 0, rows.nbytes)

    def __del__(self) -> None:
        self.ggml.ggml_backend_buffer_free(self.buffer)
        self.ggml.ggml_free(self.context)

    @override
    def ring(self, x: torch.Tensor, hot: bool) -> Ring:
        self.ggml.ggml_backend_cpu_set_n_threads(self.ggml.backend, torch.get_num_threads())
        products = PRODUCTS_PER_GRAPH if x.shape[0] <= SMALL_M else 1
        if hot:
            groups = [self.tensors[:1] * products]
        else:
            products = min(products, len(self.tensors))
            most = max(1, OUTPUT_BYTES // (4 * x.shape[0] * self.N * products))
            starts = range(0, len(self.tensors) - products + 1, products)
            groups = [self.tensors[start : start + products] for start in starts[:most]]
        graphs = [Products(self.ggml, group, x, self.N) for group in groups]
        return Ring([graph.run for graph in graphs], products, Products.result, _in_own_thread)


def _in_own_thread(function: Callable[[], Any]) -> Any:
    """Run a function in a new thread, and thus on OpenMP threads that no one else uses.

    ggml configures the AMX tiles of a thread once and for all; oneDNN, which would share its OpenMP
    threads, reconfigures them. The thread ends at once and its OpenMP threads with it: libgomp
    counts all threads, and where there are more than processors, it sends every pool to sleep
    between calls, which costs each provider's every call 40 us.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function).result()


def probe() -> None:
    """Run every type once, with one token and with several."""
    peer = LlamaCpp()
    weights = Weights.random(512, 384, torch.float32, "cpu")
    for mode in peer.modes(weights):
        loaded = peer.load(weights, mode, copies=1, E=0)
        for M in (1, 40):
            loaded.ring(weights.activations(M), hot=False).result(0)


def quantized_rows(ggml: Ggml, type_name: str, weights: Weights) -> torch.Tensor:
    """The weight c * B in one of ggml's formats, without error: uint8 [N, bytes of a row]."""
    if type_name == "q4_0":
        return _pack_q4_0(weights)
    return ggml.quantize(TYPES[type_name], weights.signs(torch.float32) * weights.scale)


def _pack_q4_0(weights: Weights) -> torch.Tensor:
    """Blocks of 32: fp16 d, then 16 bytes with weight j low and weight j+16 high; w = d * (q - 8).

    ggml's own quantizer would map one of the two signs to 7/8, so the codes are 4 and 12 instead.
    """
    codes = (weights.signs(torch.int8) * 4 + 8).to(torch.uint8).view(weights.N, -1, 2, 16)
    nibbles = codes[:, :, 0] | (codes[:, :, 1] << 4)
    d = torch.tensor([weights.scale / 4], dtype=torch.float16).view(torch.uint8)
    return torch.cat([d.expand(*nibbles.shape[:2], 2), nibbles], dim=-1).flatten(1)


if __name__ == "__main__":
    probe()
