"""Small random layer problems whose inputs are as correlated as a language model's."""

import torch


def problem(N=24, K=40, power=1.0, seed=0, dtype=torch.float64):
    """W [N, K] and a damped H [K, K] whose spectrum falls as k^-power."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, K + 1, dtype=dtype) ** -power
    basis, _ = torch.linalg.qr(torch.randn(K, K, generator=generator, dtype=dtype))
    X = torch.randn(8 * K, K, generator=generator, dtype=dtype) * spectrum.sqrt() @ basis
    H = X.T @ X
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return torch.randn(N, K, generator=generator, dtype=dtype), H


def signs_of(W):
    return torch.where(W >= 0, 1.0, -1.0).to(W.dtype)
