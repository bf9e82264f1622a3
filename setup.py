"""Builds csrc/ into vllm_bmos/kernels/libbmos_cpu.so with the system's C++ compiler.

Neither torch nor Python headers are needed: the library has a C interface, which
vllm_bmos/kernels/cpu.py loads with ctypes. Each instruction set has a source of its own, compiled
with its own flags, and is left out where the compiler does not know them; nothing else is compiled
for more than the architecture's baseline. Without a working compiler the package is installed
without the library, and `vllm_bmos.kernels.cpu` says why its kernel cannot run.

BMOS_CXXFLAGS adds flags to every compilation and to the link (for sanitizers, say).
"""

import os
import platform
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BASELINE = [
    *("bmos", "call", "with_tables", "as_product", "dense", "isa", "kernels_portable", "torch_op"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni"),
]
# The macro that says an instruction set is in the library: its source and flags.
X86 = {
    "BMOS_AVX2": ("kernels_avx2", AVX2),
    "BMOS_AVX512": ("kernels_avx512", AVX512),
    "BMOS_AMX": ("kernels_amx", ["-mamx-tile", "-mamx-int8"]),
}
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    # Every instruction set gives the same bits, so the source alone says where fma is used.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # gcc 12 warns of its own intrinsics
    "-Wno-maybe-uninitialized",
]


class BuildLibrary(build_ext):
    """Compiles each source with its own flags and links them into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain library: the same for every version of Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; a failure leaves the package without the library (`optional`)."""
        extra = shlex.split(os.environ.get("BMOS_CXXFLAGS", ""))
        flags = [*FLAGS, *extra]
        objects, macros = [], []
        if platform.machine().lower() in ("x86_64", "amd64"):
            for macro, (name, isa_flags) in X86.items():
                try:
                    objects += self.compile_one(name, [*flags, *isa_flags], [])
                    macros.append((macro, None))
                except Exception as error:
                    print(f"csrc/{name}.cpp is left out: {error}", file=sys.stderr)
        for name in BASELINE:
            objects += self.compile_one(name, flags, macros)
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=extra, target_lang="c++"
        )

    def compile_one(self, name: str, flags: list[str], macros: list[tuple[str, None]]) -> list[str]:
        """The objects of one source."""
        return self.compiler.compile(
            [f"csrc/{name}.cpp"],
            output_dir=self.build_temp,
            macros=macros,
            extra_postargs=flags,
            depends=[str(header) for header in Path("csrc").glob("*.h")],
        )


setup(
    ext_modules=[
        Extension(
            "vllm_bmos.kernels.libbmos_cpu",
            sources=[f"csrc/{path.name}" for path in sorted(Path("csrc").glob("*.cpp"))],
            depends=[f"csrc/{path.name}" for path in sorted(Path("csrc").glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
