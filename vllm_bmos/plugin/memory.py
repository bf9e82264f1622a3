"""How much memory a model takes, whether this machine has it, and memory that nobody needs."""

import ctypes
import logging
from pathlib import Path

import torch
from torch import nn

from vllm_bmos.checkpoint.format import WEIGHT

logger = logging.getLogger(__name__)


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of every tensor that hangs on a quantized layer of a vLLM model, by whatever name."""
    found = {}
    for layer in model.modules():
        if not any(name.endswith(WEIGHT) for name in layer._parameters):
            continue
        for holder in (layer._parameters, layer._buffers, vars(layer)):
            for value in holder.values():
                if isinstance(value, torch.Tensor):
                    found[value.data_ptr()] = value.nbytes  # a kernel's layers may share storage
    return sum(found.values())


def check_memory(nbytes: int, available: int | None) -> None:
    """Refuse a model that cannot fit before the system kills the process without a word.

    Args:
        nbytes: bytes of the tensors that all ranks on this machine are going to load.
        available: bytes that they can still get; None if that is not known.

    Raises:
        ValueError: saying how much is needed and how much there is.
    """
    if available is None or nbytes <= available:
        return
    raise ValueError(
        f"The weights take {nbytes / 1e9:.3g} GB on this machine, besides the KV cache "
        f"(VLLM_CPU_KVCACHE_SPACE) and vLLM itself, and {available / 1e9:.3g} GB of memory are "
        "available. Free some, or serve on a larger machine or on several (--nnodes)."
    )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that the system or this container still has (Linux); None if it does not say.

    Args:
        root: where proc and sys are found.
    """
    found = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    group = root / "sys/fs/cgroup"
    limit, stat = group / "memory.max", group / "memory.stat"
    if limit.exists() and stat.exists() and limit.read_text().strip() != "max":
        # Page cache is given back under pressure; anonymous memory is not.
        counts = dict(line.split() for line in stat.read_text().splitlines())
        found.append(int(limit.read_text()) - int(counts["anon"]))
    return min(found, default=None)


def give_back_freed() -> bool:
    """Have malloc return what this process has freed to the system, pinned heaps included.

    Returns:
        Whether the C library can do that; glibc can.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        logger.info("no malloc_trim; what the warm-up freed stays with this process")
        return False
    trim(0)
    return True
