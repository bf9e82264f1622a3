"""Error feedback: the frame that GPTQ, PB-LLM and BiLLM share.

Optimal brain surgery, column by column (GPTQ, arXiv 2210.17323, algorithm 1). With H = X^T X and U
the upper triangular factor of its inverse, H^-1 = U^T U, rounding column j of W to w_hat costs
((w_j - w_hat) / U_jj)^2 on the inputs X, if all later columns then move by the best possible
amount, -(w_j - w_hat) / U_jj * U_{j, j+1:}. Columns are taken in blocks.
"""

from collections.abc import Callable

import torch

from converters.fitting.feedback import inverse_factor

DAMPING = 0.01  # of the mean of H's diagonal, as in all three methods' code

# A block of columns [N, C] and its part of U [C, C] -> the rounded block and its errors, [N, C].
RoundBlock = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# A column's number within its block and the column [N] -> the rounded column [N].
RoundColumn = Callable[[int, torch.Tensor], torch.Tensor]


def damped(H: torch.Tensor) -> torch.Tensor:
    """H [K, K] with a ridge that makes it positive definite."""
    ridge = DAMPING * H.diagonal().mean() + torch.finfo(H.dtype).tiny
    return H + ridge * torch.eye(len(H), dtype=H.dtype)


def round_blocks(
    W: torch.Tensor, H: torch.Tensor, columns: int, round_block: RoundBlock
) -> torch.Tensor:
    """Round W [N, K] block by block under a damped H [K, K]; later blocks see earlier errors.

    Args:
        W: dense weight.
        H: from `damped`.
        columns: in a block.
        round_block: rounds one.
    """
    U = inverse_factor(H).to(W.dtype)
    W, W_hat = W.clone(), torch.empty_like(W)
    for begin in range(0, W.shape[1], columns):
        here = slice(begin, begin + columns)
        W_hat[:, here], errors = round_block(W[:, here].clone(), U[here, here])
        W[:, begin + columns :] -= errors @ U[here, begin + columns :]
    return W_hat


def round_columns(
    W: torch.Tensor, U: torch.Tensor, round_column: RoundColumn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block [N, C] column by column, with feedback inside the block.

    Returns:
        The rounded block and its errors, each [N, C].
    """
    rest, done, errors = W.T.contiguous(), torch.empty_like(W.T), torch.empty_like(W.T)
    for j in range(len(rest)):
        done[j] = round_column(j, rest[j])
        errors[j] = (rest[j] - done[j]) / U[j, j]
        rest[j + 1 :] -= torch.outer(U[j, j + 1 :], errors[j])
    return done.T, errors.T
