"""What training asks of the C library's memory allocator."""

import ctypes
import logging

logger = logging.getLogger(__name__)

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Have this process keep large tensors' memory when they are freed, for the next ones.

    A training step frees and takes the same gigabytes again. By default glibc gives them back to
    the system, which then clears them page by page.

    Returns:
        Whether the C library has this setting; glibc has.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    done = mallopt is not None and all(
        mallopt(what, LARGE) for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    )
    if not done:
        logger.info("no mallopt that takes these settings; freed memory goes back to the system")
    return done
