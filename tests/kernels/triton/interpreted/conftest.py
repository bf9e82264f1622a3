"""For a process that was started with TRITON_INTERPRET=1: see ../test_interpreted.py."""

import ctypes
import math
import mmap
import os

import pytest
import torch

from tests.kernels.triton.poison import poison

__all__ = ["guarded", "poison"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture
def guarded(monkeypatch):
    """Tensors that end where a page ends that nobody may touch; new buffers are such tensors too.

    An access behind one ends the process, which `../test_interpreted.py` reports.
    """

    def guard(tensor):
        size = tensor.numel() * tensor.element_size()
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, room + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        end = ctypes.c_void_p(address + room)
        assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        count, start = math.prod(tensor.shape), room - size
        behind = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=start)
        return behind.reshape(tensor.shape).copy_(tensor)

    new_empty = torch.Tensor.new_empty

    def guarded_empty(self, *args, **kwargs):
        buffer = new_empty(self, *args, **kwargs)
        return guard(buffer) if buffer.numel() else buffer

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_empty)
    return guard
