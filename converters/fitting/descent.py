"""Coordinate descent on signs.

With R = W - diag(a) B diag(b) and G = R H, flipping B_ij adds d = -2 a_i b_j B_ij to W_hat_ij and
changes tr(R H R^T) by d^2 H_jj - 2 d G_ij. A sweep goes through the columns once and flips, in all
rows at once, every sign whose flip lowers the loss; rows do not interact, so the loss never rises.
It ends in signs that no single flip improves: what greedy rounding with feedback cannot promise.
"""

import torch

COLUMNS = 32  # columns whose flips are applied to the rest of G together, as one matrix product


def sweep(
    W: torch.Tensor, B: torch.Tensor, a: torch.Tensor, b: torch.Tensor, H: torch.Tensor
) -> int:
    """Flip signs of B [N, K] in place where that lowers the loss; return how many.

    Args:
        W: target [N, K].
        B: signs of -1 and +1.
        a: output scales [N].
        b: input scales [K].
        H: second moment [K, K].
    """
    # Transposed, so that a column lies in one piece of memory.
    G = H @ (W - a[:, None] * B * b).T  # [K, N]
    flips = 0
    for begin in range(0, len(G), COLUMNS):
        columns = slice(begin, begin + COLUMNS)
        G_here, H_here = G[columns].clone(), H[columns, columns]
        steps = (-2 * a[:, None] * B[:, columns] * b[columns]).T.contiguous()
        for j, d in enumerate(steps):
            d *= d * (d * H_here[j, j] - 2 * G_here[j]) < 0
            G_here[j + 1 :] -= torch.outer(H_here[j, j + 1 :], d)
        G -= H[:, columns] @ steps
        flipped = (steps != 0).T
        B[:, columns] = torch.where(flipped, -B[:, columns], B[:, columns])
        flips += int(flipped.sum())
    return flips
