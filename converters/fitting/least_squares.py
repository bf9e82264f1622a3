"""Scales by exact least squares under the input's second moment.

The error of a layer W_hat = diag(a) B diag(b) on inputs with second moment H = X^T X is

    loss(B, a, b) = tr(R H R^T),    R[N,K] = W - diag(a) B diag(b)

which is a quadratic in a for fixed b, and in b for fixed a. ARB-LLM (arXiv 2410.03129, ARB-X)
alternates closed forms for one scale per row; here both scales are solved exactly:

    a_i = (b * B_i) H W_i^T / ((b * B_i) H (b * B_i)^T)
    ((A^T A) * H) b = sum_i a_i B_i * (W_i H),    A = diag(a) B
"""

import torch


def loss(
    W: torch.Tensor, B: torch.Tensor, a: torch.Tensor, b: torch.Tensor, H: torch.Tensor
) -> torch.Tensor:
    """tr(R H R^T), a scalar.

    Args:
        W: target [N, K].
        B: signs [N, K] of -1 and +1.
        a: output scales [N].
        b: input scales [K].
        H: second moment [K, K], symmetric and positive definite.
    """
    R = W - a[:, None] * B * b
    return ((R @ H) * R).sum()


def solve_a(W: torch.Tensor, B: torch.Tensor, b: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """The output scales [N] that minimise the loss for given signs and input scales."""
    V = B * b
    VH = V @ H
    return (VH * W).sum(dim=1) / (VH * V).sum(dim=1)


def solve_b(W: torch.Tensor, B: torch.Tensor, a: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """The input scales [K] that minimise the loss for given signs and output scales."""
    A = a[:, None] * B
    normal = ((A.T @ A) * H).double()
    right = (A * (W @ H)).sum(dim=0).double()
    # A^T A is positive semi-definite and H definite, so their Hadamard product is semi-definite
    # (Schur); the ridge is far below the accuracy of the scales and only keeps rounding out.
    normal.diagonal().add_(1e-9 * normal.diagonal().mean())
    factor = torch.linalg.cholesky(normal)
    return torch.cholesky_solve(right[:, None], factor)[:, 0].to(W.dtype)


def solve(
    W: torch.Tensor, B: torch.Tensor, b: torch.Tensor, H: torch.Tensor, rounds: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternate both solutions from given input scales; the loss never rises.

    Returns:
        a [N] and b [K].
    """
    a = solve_a(W, B, b, H)
    for _ in range(rounds):
        b = solve_b(W, B, a, H)
        a = solve_a(W, B, b, H)
    return a, b
