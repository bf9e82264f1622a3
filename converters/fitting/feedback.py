"""Signs with error feedback: the GPTQ solver with a one-bit quantizer.

GPTQ (arXiv 2210.17323, algorithm 1) rounds a weight matrix column by column and spreads each
column's error over the columns that are still to come, in the way that changes the layer's output
least under H = X^T X. As in BiLLM (arXiv 2402.04291) the quantizer is the nearest of two levels;
here these are +-a_i b_j. Columns go in the order of falling H_jj ("act-order").
"""

import torch

COLUMNS = 32  # columns whose errors are spread over the rest together, as one matrix product


def signs(W: torch.Tensor, a: torch.Tensor, b: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Choose B [N, K] of -1 and +1 for W ~ diag(a) B diag(b).

    Args:
        W: target [N, K].
        a: output scales [N].
        b: input scales [K].
        H: damped second moment [K, K], positive definite.
    """
    order = H.diagonal().argsort(descending=True, stable=True)
    # Transposed, so that a column lies in one piece of memory.
    W, b, H = W.T[order].contiguous(), b[order], H[order][:, order]  # W [K, N]
    U = inverse_factor(H).to(W.dtype)
    B = torch.empty_like(W)
    for begin in range(0, len(W), COLUMNS):
        end = min(begin + COLUMNS, len(W))
        errors = torch.empty_like(W[begin:end])
        for j in range(begin, end):
            levels = a * b[j]
            B[j] = torch.where(W[j] * levels >= 0, 1.0, -1.0)
            errors[j - begin] = (W[j] - levels * B[j]) / U[j, j]
            W[j + 1 : end] -= torch.outer(U[j, j + 1 : end], errors[j - begin])
        W[end:] -= U[begin:end, end:].T @ errors
    result = torch.empty_like(B)
    result[order] = B
    return result.T.contiguous()


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """The upper triangular U [K, K] with U^T U = H^-1, in float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H.double()))
    return torch.linalg.cholesky(inverse, upper=True)
