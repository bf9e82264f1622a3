"""Which layers the CPU kernel takes, what it refuses, and what is in its library."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.kernels import oracle
from vllm_bmos.kernels import LinearConfig, LinearTensors, choose_kernel, cpu

CONFIG = LinearConfig(200, (70,), 4, torch.bfloat16, torch.float16, "cpu")

try:
    ISAS = cpu.isas()
except OSError as missing:
    pytest.skip(f"the library is not built: {missing}", allow_module_level=True)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads the environment once."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_mode_is_the_variables_else_the_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.MODE_ENV, raising=False)
    found = {dtype: cpu.mode(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert list(found.values()) == ["exact", "default", "default"]
    monkeypatch.setenv(cpu.MODE_ENV, "int8")
    assert cpu.mode(torch.float32) == cpu.mode(torch.bfloat16) == "int8"


def test_is_chosen_on_the_cpu() -> None:
    assert choose_kernel(CONFIG).name == "cpu"
    able, reason = cpu.CpuKernel().can_run(CONFIG)
    assert able
    assert ISAS[0] in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "runs on the CPU only"),
        ({"dtype": torch.float64}, "float64 activations"),
        ({"K": 65537}, "K=65537 is more than 65536"),
    ],
)
def test_refuses(change: dict[str, object], reason: str) -> None:
    config = LinearConfig(**{**vars(CONFIG), **change})
    able, why = cpu.CpuKernel().can_run(config)
    assert not able
    assert reason in why


@pytest.mark.parametrize(
    ("name", "value", "reasons"),
    [
        ("LIBRARY", cpu.LIBRARY.with_name("absent.so"), ["absent.so", "C++ compiler"]),
        ("ABI", cpu.ABI + 1, ["was built from another version of csrc/"]),
    ],
    ids=["missing", "another version"],
)
def test_a_library_that_cannot_be_used_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, reasons: list[str]
) -> None:
    monkeypatch.setattr(cpu, name, value)
    cpu.library.cache_clear()
    try:
        able, why = cpu.CpuKernel().can_run(CONFIG)
    finally:
        cpu.library.cache_clear()
    assert not able
    assert all(reason in why for reason in reasons)


@pytest.mark.parametrize("name", ISAS)
def test_environment_forces_the_instruction_set(name: str) -> None:
    code = "from vllm_bmos.kernels import cpu; print(cpu.isa())"
    done = run_python(code, **{cpu.ISA_ENV: name})
    assert done.stdout.strip() == name, done.stderr


def test_unknown_instruction_set() -> None:
    done = run_python("from vllm_bmos.kernels import cpu; cpu.library()", **{cpu.ISA_ENV: "mmx"})
    assert "VLLM_BMOS_CPU_ISA=mmx" in done.stderr
    assert "portable" in done.stderr


def test_unknown_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.MODE_ENV, "fast")
    with pytest.raises(ValueError, match=r"VLLM_BMOS_CPU_MODE=fast.*int8, default, exact"):
        cpu.CpuKernel().can_run(CONFIG)


def test_wrong_calls_are_named() -> None:
    layer = oracle.random_layer((70,), 200, 4)
    tensors = LinearTensors(layer.weight, layer.s_in, layer.s_out, layer.router)
    kernel, x = cpu.CpuKernel(), torch.zeros(1, 200)
    with pytest.raises(ValueError, match="was not prepared"):
        kernel.linear(x, None, tensors, None, [70])
    prepared = kernel.prepare(tensors, CONFIG)
    with pytest.raises(ValueError, match="do not fit together"):
        kernel.linear(x, None, prepared, None, [71])
    with pytest.raises(ValueError, match="do not fit together"):
        kernel.linear(torch.zeros(1, 199), None, prepared, None, [70])


def test_the_library_has_no_openmp_runtime_of_its_own() -> None:
    done = subprocess.run(["ldd", str(cpu.LIBRARY)], capture_output=True, text=True, check=True)
    assert not re.search(r"gomp|iomp|libomp", done.stdout)
    code = (
        "import ctypes\n"
        f"try: ctypes.CDLL({str(cpu.LIBRARY)!r})\n"
        "except OSError as error: print(error)\n"
    )
    # Without torch there is no runtime, and the loader says so.
    assert "undefined symbol" in run_python(code).stdout


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there are no wide ones")
def test_wide_registers_are_used_in_their_own_namespaces_only() -> None:
    code = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(cpu.LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    registers: dict[str, set[str]] = {}
    function = ""
    for line in code.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.+)>:", line):
            function = start[1]
        else:
            vectors = re.findall(r"%([xyz])mm", line) if re.search(r"\sv[a-z]", line) else []
            registers.setdefault(function, set()).update(vectors)
    for isa, widest in (("avx2", "y"), ("avx512", "z")):  # else one did not compile
        assert any(f"bmos::{isa}::" in name and widest in used for name, used in registers.items())
    assert any("bmos::amx::" in name for name in registers)
    for name, used in registers.items():
        allowed = "xyz" if "bmos::avx512::" in name else "xy" if "bmos::avx2::" in name else ""
        assert used <= set(allowed), name


def test_layout_constants_match_the_header() -> None:
    library = cpu.library()
    sizes = (ctypes.c_int64 * 2)(1, 33)
    # 64 bytes of header, three blocks of 32 rows, K padded to 64.
    assert library.bmos_packed_bytes(65, sizes, 2) == 64 + 3 * 32 * 128 // 8
    assert library.bmos_packed_bytes(0, sizes, 2) == -1
