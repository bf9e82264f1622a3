"""Targets that make up for the error of what is quantized already.

A layer of the half-converted model sees inputs X_hat, not the dense model's X. QEP (quantization
error propagation, NeurIPS 2025, arXiv 2504.09629) therefore fits W X_hat^T to the dense output
W X^T. A layer whose output is added to the residual stream can also make up for what the stream
lacks there, r - r_hat. The best dense weight for that is the least-squares solution

    W' = W + alpha (W (X - X_hat)^T X_hat + (r - r_hat)^T X_hat) (X_hat^T X_hat + damping)^-1

It is then quantized under H = X_hat^T X_hat like any weight. Rows of X are tokens.
"""

from dataclasses import dataclass

import torch


@dataclass
class Moments:
    """Sums over calibration tokens that determine W'.

    Attributes:
        H: X_hat^T X_hat [K, K].
        shift: (X - X_hat)^T X_hat [K, K].
        residual: (r - r_hat)^T X_hat [N, K], or None for a layer that writes no residual.
        tokens: how many were added.
    """

    H: torch.Tensor
    shift: torch.Tensor
    residual: torch.Tensor | None = None
    tokens: int = 0

    @classmethod
    def zeros(cls, K: int, N: int | None = None) -> "Moments":
        """Empty sums; N is given for a layer that writes the residual stream."""
        residual = None if N is None else torch.zeros(N, K)
        return cls(torch.zeros(K, K), torch.zeros(K, K), residual)

    def add(
        self,
        X: torch.Tensor,
        X_hat: torch.Tensor,
        missing: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            X: the dense model's inputs [tokens, K].
            X_hat: the converted model's [tokens, K].
            missing: r - r_hat [tokens, N].
            weights: of the tokens [tokens]; all 1 if not given.
        """
        difference = X - X_hat
        if weights is not None:
            # Both factors get the root: so H stays semi-definite whatever the products round to.
            root = weights.sqrt()[:, None]
            X_hat, difference = root * X_hat, root * difference
            missing = None if missing is None else root * missing
        self.H += X_hat.T @ X_hat
        self.shift += difference.T @ X_hat
        if self.residual is not None and missing is not None:
            self.residual += missing.T @ X_hat
        self.tokens += len(X)

    def __iadd__(self, other: "Moments") -> "Moments":
        """Add another part's sums."""
        self.H += other.H
        self.shift += other.shift
        if self.residual is not None and other.residual is not None:
            self.residual += other.residual
        self.tokens += other.tokens
        return self

    def damped(self, damping: float) -> torch.Tensor:
        """H plus `damping` times the mean of its diagonal, [K, K], and never singular."""
        H = self.H.clone()
        H.diagonal().add_(damping * H.diagonal().mean() + torch.finfo(H.dtype).tiny)
        return H


def target(W: torch.Tensor, moments: Moments, alpha: float, damping: float) -> torch.Tensor:
    """W' [N, K] for a dense weight W [N, K].

    Args:
        W: dense weight.
        moments: sums over the calibration tokens.
        alpha: how much of the error to make up for, from 0 to 1.
        damping: relative ridge of the least-squares solution.
    """
    error = W @ moments.shift
    if moments.residual is not None:
        error = error + moments.residual
    factor = torch.linalg.cholesky(moments.damped(damping).double())
    return W + alpha * torch.cholesky_solve(error.double().T, factor).T.to(W.dtype)
