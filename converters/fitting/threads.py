"""Parallel work whose results do not depend on the number of threads.

Most ops of a fit are small, and an op that waits for other threads costs more than it saves. So
each op has one thread, whole pieces of work run side by side, and sums are taken in a fixed order.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_per_op() -> Iterator[None]:
    """For jobs side by side: sums in one order, so bytes never vary with the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workers(count: int = 0) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads with one thread per op.

    Args:
        count: of threads; 0 takes one per core.
    """
    with one_thread_per_op(), ThreadPoolExecutor(count or len(os.sched_getaffinity(0))) as pool:
        yield pool
