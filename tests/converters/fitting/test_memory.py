"""Freed memory stays with the process, where the C library can be told so."""

import platform
import subprocess
import sys

import pytest

from converters.fitting import memory

FREED = """
from converters.fitting.memory import keep_freed_memory
import mmap, sys, torch

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE

assert sys.argv[1] == "default" or keep_freed_memory()
before = resident()
x = torch.zeros(256 << 20, dtype=torch.uint8) + 1
del x
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is known to obey")
def test_freed_memory_is_kept() -> None:
    kept = {}
    for how in ("default", "kept"):
        line = [sys.executable, "-c", FREED, how]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        kept[how] = int(done.stdout)
    assert kept["default"] < 64 << 20 and kept["kept"] > 192 << 20, kept


def test_another_c_library_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    with caplog.at_level("INFO"):
        assert not memory.keep_freed_memory()
    assert "no mallopt" in caplog.text
