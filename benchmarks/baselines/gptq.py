"""GPTQ (arXiv 2210.17323): uniform rounding with error feedback, here at 2 bits in groups of 128.

As in its authors' code: a group's grid is the min-max grid of its weights at the moment when the
feedback reaches them; columns in their own order.
"""

import torch

from baselines.feedback import damped, round_blocks, round_columns
from baselines.quantized import Quantized
from baselines.uniform import Grid, stored_bits

BITS, GROUP = 2, 128


def quantize(W: torch.Tensor, H: torch.Tensor, bits: int = BITS, group: int = GROUP) -> Quantized:
    """Quantize a layer.

    Args:
        W: dense weight [N, K].
        H: X^T X of the layer's inputs [K, K].
        bits: of a code.
        group: columns that share a grid; the last group may be shorter.
    """

    def round_group(part: torch.Tensor, U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grid = Grid.of(part, bits)
        return round_columns(part, U, lambda j, w: grid.round(w))

    stored = stored_bits(W.shape[1], bits, group)
    return Quantized(round_blocks(W, damped(H), group, round_group), stored, stored)


def round_to_nearest(W: torch.Tensor, bits: int = BITS, group: int = GROUP) -> Quantized:
    """The same grids without feedback (RTN): what GPTQ has to beat."""
    parts = [Grid.of(part, bits).round(part.T).T for part in W.split(group, dim=1)]
    stored = stored_bits(W.shape[1], bits, group)
    return Quantized(torch.cat(parts, dim=1), stored, stored)
