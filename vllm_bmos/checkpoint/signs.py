"""Signs and bits.

Bit i (value 2**i, least significant first) of byte j of a row is the sign of weight k = 8*j + i:
1 means +1 and 0 means -1. The bits from K to the end of the last byte are padding and 0.
"""

import numpy as np
import torch

from vllm_bmos.checkpoint.format import FormatError, packed_width


def pack_signs(positive: torch.Tensor) -> torch.Tensor:
    """Pack bool [N, K], True for +1, into uint8 [N, ceil(K/8)] on the CPU.

    Raises:
        TypeError: if the tensor is not bool. Callers decide what a zero becomes, not this function.
    """
    if positive.dtype != torch.bool:
        raise TypeError(f"pack_signs: expected a bool tensor, found {positive.dtype}")
    bits = np.packbits(positive.cpu().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(bits)


def unpack_signs(packed: torch.Tensor, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unpack uint8 [N, ceil(K/8)] to B [N, K] of -1 and +1 in `dtype`, on the tensor's device."""
    check_width(packed, K)
    byte_signs = _byte_signs(dtype, packed.device)
    return byte_signs[packed.int()].flatten(-2)[..., :K]


def padding_is_zero(packed: torch.Tensor, K: int) -> bool:
    """Whether the bits behind weight K-1 of every row are 0, as the format demands."""
    used = K % 8
    return used == 0 or not bool((packed[..., -1] >> used).any())


def check_width(packed: torch.Tensor, K: int) -> None:
    """Raise FormatError unless `packed` is uint8 with ceil(K/8) bytes a row."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(K):
        raise FormatError(
            f"packed signs: expected uint8 [N, {packed_width(K)}] for K={K}, found "
            f"{packed.dtype} {list(packed.shape)}"
        )


def _byte_signs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256, 8]: the eight signs of every byte value."""
    values = torch.arange(256, dtype=torch.int32, device=device).unsqueeze(1)
    bits = (values >> torch.arange(8, dtype=torch.int32, device=device)) & 1
    return (2 * bits - 1).to(dtype)
