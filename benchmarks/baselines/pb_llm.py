"""PB-LLM (arXiv 2310.00034): the salient tenth of the weights at 8 bits, the rest binary.

The post-training form (PB-GPTQ) of section 3.2: a weight is salient by what its removal would cost,
w^2 / U_jj^2 (`hessian` in the authors' code); the salient ones go to an 8-bit grid of their row,
the others to mean +- scale, with error feedback over both. One mean and one scale for each row of
a block of 128 columns.
"""

import torch

from baselines.binary import binary_levels
from baselines.feedback import damped, round_blocks, round_columns
from baselines.quantized import Quantized
from baselines.uniform import Grid

SALIENT, HIGH_BITS, GROUP = 0.1, 8, 128


def quantize(W: torch.Tensor, H: torch.Tensor, share: float = SALIENT) -> Quantized:
    """Quantize a layer.

    Args:
        W: dense weight [N, K].
        H: X^T X of the layer's inputs [K, K].
        share: of the weights that are salient.
    """
    high = Grid.of(W, HIGH_BITS)

    def round_block(part: torch.Tensor, U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        salient = salient_mask(part, U.diagonal(), share)
        mean, scale = binary_levels(part, ~salient)

        def round_column(j: int, w: torch.Tensor) -> torch.Tensor:
            low = torch.where(w >= mean, mean + scale, mean - scale)
            return torch.where(salient[:, j], high.round(w), low)

        return round_columns(part, U, round_column)

    weight = round_blocks(W, damped(H), GROUP, round_block)
    return Quantized(weight, stored_bits(W.shape[1], share), published_bits(share))


def salient_mask(W: torch.Tensor, U_diagonal: torch.Tensor, share: float) -> torch.Tensor:
    """Which weights of W [N, C] are among the `share` that cost most to lose."""
    cost = (W / U_diagonal).square().flatten()
    mask = torch.zeros(cost.shape, dtype=torch.bool)
    mask[cost.topk(round(share * len(cost))).indices] = True
    return mask.view_as(W)


def published_bits(share: float) -> float:
    """The paper's count: codes alone, 1.7 for a tenth."""
    return share * HIGH_BITS + (1 - share)


def stored_bits(K: int, share: float) -> float:
    """Codes, the mask (1 bit a weight), and float16 levels: 2 a row and block, grid a row."""
    blocks = -(-K // GROUP)
    return published_bits(share) + 1 + (blocks * 2 * 16 + 16 + HIGH_BITS) / K
