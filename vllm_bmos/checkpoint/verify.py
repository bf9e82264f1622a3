"""Re-reads a packed checkpoint whole: what opening it checks, and every byte of its tensors."""

from collections.abc import Callable
from pathlib import Path

import torch

from vllm_bmos.checkpoint.format import SCALES, WEIGHT, FormatError
from vllm_bmos.checkpoint.reader import Checkpoint
from vllm_bmos.checkpoint.signs import padding_is_zero
from vllm_bmos.checkpoint.writer import hash_extent


def verify(path: str | Path, progress: Callable[[str], None] = lambda name: None) -> Checkpoint:
    """Verify a packed checkpoint and return it, opened.

    Args:
        path: the checkpoint's directory.
        progress: called with the name of each tensor after it was checked.

    Raises:
        FormatError: naming the first file, key or tensor that breaks the format.
    """
    checkpoint = Checkpoint(path)
    for name, extent in checkpoint.extents.items():
        if hash_extent(extent) != checkpoint.manifest[name]["sha256"]:
            raise FormatError(
                f"{name}: its bytes do not have the sha256 that the manifest records. The "
                "checkpoint is damaged; download or convert it again."
            )
        progress(name)
    for module, (_, K) in checkpoint.shapes.items():
        check_values(checkpoint, module, K)
    return checkpoint


def check_values(checkpoint: Checkpoint, module: str, K: int) -> None:
    """Check the data of one quantized layer: finite scales and router, zero padding bits."""
    for suffix in SCALES:
        check_finite(f"{module}.{suffix}", checkpoint.tensor(f"{module}.{suffix}"))
    if K % 8 and not padding_is_zero(checkpoint.tensor(f"{module}.{WEIGHT}"), K):
        raise FormatError(
            f"{module}.{WEIGHT}: the padding bits behind weight {K - 1} of a row are not all 0. "
            "It was written by another tool; convert the model again."
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise FormatError if a scale or router tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(
            f"{name} holds NaN or infinity. Convert the model again, with a wider --scale-dtype "
            "if a scale overflows."
        )
