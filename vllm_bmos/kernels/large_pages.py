"""Memory for prepared layers on pages of 2 MB.

A layer of one-bit weights is a few megabytes that are read once per token. On small pages the
processor's prefetcher stops every 4 KB, and each page costs a walk of the page tables, which is
dearest in a virtual machine. A layer alone seldom holds a whole aligned large page, so layers
lie one behind the other in areas that are made of them.
"""

import mmap
import threading
from contextlib import suppress

import torch

__all__ = ["empty"]

PAGE = 2 << 20
AREA = 32 * PAGE  # addresses only: a page takes memory when it is first written
ALIGNMENT = 64  # a cache line


class _Area:
    """Address space on large pages where the system grants them. Its tensors keep it alive."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, size + PAGE, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without large pages refuses the advice
                memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE
        self.bytes = whole[start : start + size]
        self.used = 0

    def take(self, size: int) -> torch.Tensor | None:
        start = -(-self.used // ALIGNMENT) * ALIGNMENT
        if start + size > len(self.bytes):
            return None
        self.used = start + size
        return self.bytes[start : self.used]


_area: _Area | None = None
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor of `shape`, on a cache line, behind the one before it."""
    global _area
    size = torch.Size(shape).numel() * dtype.itemsize
    if size > AREA:  # it fills an area of its own, which goes when it goes
        taken = _Area(size).take(size)
    else:
        with _lock:
            taken = _area.take(size) if _area else None
            if taken is None:
                _area = _Area(AREA)
                taken = _area.take(size)
    assert taken is not None
    return taken.view(dtype).view(shape)
