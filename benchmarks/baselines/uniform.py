"""Uniform rounding between the least and the largest weight of each row (asymmetric min-max)."""

from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """Levels scale * (q - zero) for q = 0 ... 2^bits - 1, one grid a row: scale and zero [N]."""

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    @classmethod
    def of(cls, W: torch.Tensor, bits: int) -> "Grid":
        """The grid of each row of W [N, C]; zero is always one of its levels."""
        low, high = W.amin(dim=1).clamp_max(0), W.amax(dim=1).clamp_min(0)
        scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(W.dtype).tiny)
        return cls(scale, (-low / scale).round(), bits)

    def round(self, W: torch.Tensor) -> torch.Tensor:
        """The nearest level of every weight of some columns [..., N]."""
        q = ((W / self.scale).round() + self.zero).clamp(0, 2**self.bits - 1)
        return self.scale * (q - self.zero)


def stored_bits(K: int, bits: int, group: int) -> float:
    """Bits per weight of the codes, and of a float16 scale and a zero point for each group."""
    groups = -(-K // group)
    return bits + groups * (16 + bits) / K
