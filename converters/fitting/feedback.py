"""Signs with error feedback: the GPTQ solver with a one-bit quantizer.

GPTQ (arXiv 2210.17323, algorithm 1) rounds a weight matrix column by column and spreads each
column's error over the columns that are still to come, in the way that changes the layer's output
least under H = X^T X. As in BiLLM (arXiv 2402.04291) the quantizer is the nearest of two levels;
here these are +-a_i b_j. Columns go in the order of falling H_jj ("act-order").
"""

import torch

COLUMNS = 128  # columns whose errors are spread together: matrix products instead of rank-1 updates


def signs(
    W: torch.Tensor, a: torch.Tensor, b: torch.Tensor, H: torch.Tensor
) -> torch.Tensor:
    """Choose B [N, K] of -1 and +1 for W ~ diag(a) B diag(b).

    Args:
        W: target [N, K].
        a: output scales [N].
        b: input scales [K].
        H: damped second moment [K, K], positive definite.
    """
    order = H.diagonal().argsort(descending=True, stable=True)
    W, b, H = W[:, order].clone(), b[order], H[order][:, order]
    U = inverse_factor(H).to(W.dtype)
    B = torch.empty_like(W)
    K = W.shape[1]
    for begin in range(0, K, COLUMNS):
        end = min(begin + COLUMNS, K)
        errors = W.new_empty(W.shape[0], end - begin)
        for j in range(begin, end):
            levels = a * b[j]
            B[:, j] = torch.where(W[:, j] * levels >= 0, 1.0, -1.0)
            error = (W[:, j] - levels * B[:, j]) / U[j, j]
            W[:, j:end] -= torch.outer(error, U[j, j:end])
            errors[:, j - begin] = error
        W[:, end:] -= errors @ U[begin:end, end:]
    result = torch.empty_like(B)
    result[:, order] = B
    return result


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """The upper triangular U [K, K] with U^T U = H^-1, in float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H.double()))
    return torch.linalg.cholesky(inverse, upper=True)
