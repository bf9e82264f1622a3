"""Compile the launches of a layer for a GPU that is not here, and read what came out.

    python -m vllm_bmos.kernels.triton.aot --arch 86 --K 4096 --shards 4096 --M 1

runs the real launcher on tensors without storage, records every launch, compiles each exactly as
Triton would at that launch, and prints registers, spills, shared memory, the tensor-core
instructions and the instructions per weight of the hottest loop. `tests/kernels/triton` asserts on
these facts and `benchmarks/gpu_limits.py` computes with them. Compiling needs a process without
TRITON_INTERPRET=1.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from vllm_bmos.kernels.base import LinearTensors
from vllm_bmos.kernels.triton import kernels, launch

ARCHS = (80, 86, 89, 90, 100, 120)
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA = re.compile(r"^(HMMA|HGMMA|UTCHMMA|IMMA|QGMMA)")


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch. Tensors among `args` are stand-ins without storage."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Sass:
    """What the compiler made of one launch.

    Attributes:
        registers: per thread.
        spills: loads and stores of local memory (STL, LDL) plus the bytes of stack.
        shared: bytes of shared memory of a program.
        tmem: columns of tensor memory of a program (sm_100).
        code: the opcodes of the kernel, such as "LDGSTS.E.BYPASS.128".
        loop: the opcodes of its hottest loop: the one with most MMAs, else the longest.
        ptx: the PTX.
    """

    registers: int
    spills: int
    shared: int
    tmem: int
    code: list[str] = field(repr=False)
    loop: list[str] = field(repr=False)
    ptx: str = field(repr=False)

    def count(self, pattern: str, opcodes: list[str] | None = None) -> int:
        """How many opcodes match from their start, of the whole kernel or of a given list."""
        code = self.code if opcodes is None else opcodes
        return sum(bool(re.match(pattern, op)) for op in code)

    def mmas(self, opcodes: list[str] | None = None) -> Counter[str]:
        """The tensor-core instructions by name."""
        return Counter(op for op in (self.code if opcodes is None else opcodes) if MMA.match(op))

    def loads(self, opcodes: list[str] | None = None) -> Counter[str]:
        """The global loads by name, asynchronous copies included."""
        code = self.code if opcodes is None else opcodes
        return Counter(op for op in code if re.match(r"LDG(STS)?\b", op))

    def instructions_per_weight(self, weights: int) -> float:
        """Instructions of the loop per lane and weight, a loop that consumes `weights` per lane."""
        return len(self.loop) / weights


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record every launch inside instead of launching."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launches.append(Launch(kernel, grid, args, {"enable_fp_fusion": True, **options}))

    with mock.patch.object(launch, "launch", record):
        yield launches


def layer_launches(
    arch: int,
    M: int,
    K: int,
    shard_sizes: tuple[int, ...],
    E: int = 4,
    dtype: torch.dtype = torch.float16,
    scale_dtype: torch.dtype = torch.float16,
    biased: bool = False,
) -> list[Launch]:
    """The launches of one call of a layer on a GPU of this architecture, on fake CUDA tensors."""
    S, N = len(shard_sizes), sum(shard_sizes)
    with (
        FakeTensorMode(),
        recording() as launches,
        mock.patch.object(torch.cuda, "get_device_capability", lambda _=None: divmod(arch, 10)),
    ):

        def empty(*shape: int, dtype: torch.dtype = scale_dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        tensors = LinearTensors(
            weight=empty(N, -(-K // 8), dtype=torch.uint8),
            in_channel_scale=empty(S, E, K),
            out_channel_scale=empty(E, N),
            router_weight=empty(S, E, K),
        )
        prepared = launch.prepare(tensors, shard_sizes, K)
        bias = empty(N, dtype=dtype) if biased else None
        launch.linear(empty(M, K, dtype=dtype), None, prepared, bias, list(shard_sizes))
    return launches


def compile_launch(recorded: Launch, target: GPUTarget) -> Any:
    """Compile a recorded launch for a target, specialised as Triton's JIT would specialise it."""
    args = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in recorded.args]
    kernel, backend = recorded.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **recorded.options)
    parsed, signature, constexprs, attrs = kernel._pack_args(
        backend, recorded.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=parsed.__dict__)


def compile_sass(recorded: Launch, arch: int) -> Sass:
    """Compile a recorded launch for an NVIDIA architecture and disassemble it."""
    compiled = compile_launch(recorded, GPUTarget("cuda", arch, 32))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = _tool("nvdisasm", "-c", str(cubin))
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    code, loop = _parse(listing)
    return Sass(
        registers=registers,
        spills=sum(op.startswith(("STL", "LDL")) for op in code) + stack,
        shared=compiled.metadata.shared,
        tmem=getattr(compiled.metadata, "tmem_size", None) or 0,
        code=code,
        loop=loop,
        ptx=compiled.asm["ptx"],
    )


def _tool(name: str, *args: str) -> str:
    run = subprocess.run([str(NVIDIA_TOOLS / name), *args], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} {' '.join(args)}: {run.stderr.strip()}")
    return run.stdout


def _parse(listing: str) -> tuple[list[str], list[str]]:
    """The opcodes of a listing, and those of its hottest loop, in order."""
    code: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            code.append(found[1])
            if found[1].startswith("BRA") and (to := re.search(r"\.L_\w+", found[2])):
                branches.append((len(code), to[0]))
    loops = [code[labels[to] : at] for at, to in branches if labels[to] < at - 1]

    def heat(ops: list[str]) -> tuple[int, int]:
        return sum(bool(MMA.match(op)) for op in ops), len(ops)

    return code, max(loops, key=heat, default=[])


def main() -> None:
    """Print the facts of one layer's launches on one architecture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=86, help="compute capability without its dot")
    parser.add_argument("--M", type=int, default=1, help="tokens")
    parser.add_argument("--K", type=int, default=4096, help="inputs")
    parser.add_argument("--E", type=int, default=4, help="experts")
    parser.add_argument("--shards", type=int, nargs="+", default=[4096], help="their outputs")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    for recorded in layer_launches(args.arch, args.M, args.K, tuple(args.shards), args.E, dtype):
        sass = compile_sass(recorded, args.arch)
        print(f"{recorded.name} grid={recorded.grid} {sass}")
        print(f"  loop: {len(sass.loop)} instructions, MMA {dict(sass.mmas(sass.loop))}")
        print(f"  loads in the loop: {dict(sass.loads(sass.loop))}; of all: {dict(sass.loads())}")
        if recorded.name == kernels.gemm.__name__:
            tile = recorded.options
            weights = tile["BN"] * tile["BKW"] * launch.WORD // (32 * tile["num_warps"])
            ratio = sass.instructions_per_weight(weights)
            print(f"  instructions per weight and lane: {ratio:.2f}")


if __name__ == "__main__":
    main()
