"""What a fit must know of the processes that torchrun started: who writes, and when to wait."""

import os
from datetime import timedelta

import torch

PATIENCE = timedelta(days=7)  # the other processes wait while the first one runs a whole stage


def world_size() -> int:
    """Processes that work together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_gpu() -> bool:
    """Whether training has a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this process trains."""
    if not has_gpu():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def is_main() -> bool:
    """Whether this process writes files and log lines."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() == 1:
        return
    if not torch.distributed.is_initialized():
        backend = "nccl" if has_gpu() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    torch.distributed.barrier()
