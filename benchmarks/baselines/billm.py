"""BiLLM (arXiv 2402.04291): salient columns twice binary, the bell of the others split in two.

In each block of 128 columns: the columns that cost most to lose are salient, and get a second
binary matrix for the residual of the first. The other weights are split by magnitude at the point
that leaves the least error, and each part has its own levels. The block's error is fed back to
the blocks to come. As in the authors' code, levels are mean +- scale of a row's part.
"""

from typing import NamedTuple

import torch

from baselines.binary import binary_levels
from baselines.feedback import damped, round_blocks
from baselines.quantized import Quantized

GROUP = 128
MOST_SALIENT = 50  # columns in a block
QUANTILES = torch.linspace(0.1, 0.9, 81)  # of the magnitudes, where a split is tried


class Split(NamedTuple):
    """A block's parts, each a mask [N, C] that leaves the others out."""

    salient: torch.Tensor
    tail: torch.Tensor
    bell: torch.Tensor


def quantize(W: torch.Tensor, H: torch.Tensor) -> Quantized:
    """Quantize a layer.

    Args:
        W: dense weight [N, K].
        H: X^T X of the layer's inputs [K, K].
    """
    columns = 0

    def round_block(part: torch.Tensor, U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal columns
        split = split_block(part, U.diagonal())
        columns += int(split.salient[0].sum())
        rounded = binarize_block(part, split)
        return rounded, (part - rounded) / U.diagonal()

    weight = round_blocks(W, damped(H), GROUP, round_block)
    salient = columns / W.shape[1]
    return Quantized(weight, stored_bits(W.shape[1], salient), published_bits(salient))


def split_block(W: torch.Tensor, U_diagonal: torch.Tensor) -> Split:
    """Choose the salient columns and the split of W [N, C]."""
    salient = torch.zeros(W.shape, dtype=torch.bool)
    salient[:, salient_columns(W, U_diagonal)] = True
    magnitude = W.abs()
    threshold = best_split(W, ~salient)
    return Split(salient, ~salient & (magnitude > threshold), ~salient & (magnitude <= threshold))


def salient_columns(W: torch.Tensor, U_diagonal: torch.Tensor) -> torch.Tensor:
    """The columns of W [N, C] to make salient: those of largest cost, as many as binarize best.

    Their number is the one for which two binary matrices, one for them and one for the rest, have
    the least error (algorithm 2 of the paper, `salient`).
    """
    cost = (W / U_diagonal).square().sum(dim=0)
    order = cost.argsort(descending=True)
    best, least = 1, torch.inf
    for count in range(1, min(MOST_SALIENT, len(order) - 1) + 1):
        chosen = torch.zeros(W.shape, dtype=torch.bool)
        chosen[:, order[:count]] = True
        error = float(_error(W, chosen) + _error(W, ~chosen))
        if error < least:
            best, least = count, error
    return order[:best]


def best_split(W: torch.Tensor, mask: torch.Tensor) -> float:
    """The magnitude at which to split the weights of W [N, C] inside the mask."""
    magnitude = W.abs()
    best, least = 0.0, torch.inf
    for threshold in magnitude[mask].quantile(QUANTILES.to(W.dtype)).tolist():
        tail, bell = mask & (magnitude > threshold), mask & (magnitude <= threshold)
        error = float(_error(W, tail) + _error(W, bell))
        if error < least:
            best, least = threshold, error
    return best


def binarize_block(W: torch.Tensor, split: Split) -> torch.Tensor:
    """W [N, C] by two binary matrices where it is salient, and one in each other part."""
    return residual(W, split.salient) + binarize(W, split.tail) + binarize(W, split.bell)


def residual(W: torch.Tensor, mask: torch.Tensor, order: int = 2) -> torch.Tensor:
    """The sum of `order` binary matrices, each of what those before it left (section 3.2)."""
    total = torch.zeros_like(W)
    for _ in range(order):
        total += binarize(W - total, mask)
    return total


def binarize(W: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean +- mean distance from it, of each row's weights inside the mask; 0 outside [N, C]."""
    mean, scale = (level[:, None] for level in binary_levels(W, mask))
    return torch.where(W >= mean, mean + scale, mean - scale) * mask


def _error(W: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error of `binarize` inside the mask: what mean and scale of a row do not hold."""
    mean, scale = binary_levels(W, mask)
    held = mask.sum(dim=1) * (mean.square() + scale.square())
    return (W.square() * mask).sum() - held.sum()


def published_bits(salient: float) -> float:
    """The paper's count for a share of salient columns: codes, and which columns are salient."""
    return 1 + salient + 1 / GROUP


def stored_bits(K: int, salient: float) -> float:
    """The paper's count, which part each weight is in, and a row's 4 means and scales a block."""
    blocks = -(-K // GROUP)
    return published_bits(salient) + (1 - salient) + blocks * 8 * 16 / K
