"""The layer in float64 and numpy, written from the equations and from docs/FORMAT.md alone.

It shares no code with vllm_bmos, so that no test compares the package with itself.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Layer:
    """A layer in the checkpoint's layout: S shards of shard_sizes outputs, side by side."""

    shard_sizes: tuple[int, ...]
    K: int
    weight: torch.Tensor  # uint8 [N, ceil(K/8)]
    s_in: torch.Tensor  # [S, E, K]
    s_out: torch.Tensor  # [E, N]
    router: torch.Tensor  # [S, E, K]

    @property
    def N(self) -> int:
        return sum(self.shard_sizes)

    @property
    def E(self) -> int:
        return self.s_out.shape[0]


def random_layer(
    shard_sizes: tuple[int, ...],
    K: int,
    E: int,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Layer:
    """Random signs, positive scales around 1, and a router whose softmax is not saturated."""
    rng = np.random.default_rng([seed, K, E, *shard_sizes])
    N, S = sum(shard_sizes), len(shard_sizes)
    bits = rng.integers(0, 2, (N, K), dtype=np.uint8)

    def scales(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(0.5, 1.5, shape)).to(scale_dtype)

    router = torch.from_numpy(rng.normal(0, K**-0.5, (S, E, K))).to(scale_dtype)
    packed = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))
    return Layer(shard_sizes, K, packed, scales(S, E, K), scales(E, N), router)


def logits_of(layer: Layer, x: torch.Tensor) -> np.ndarray:
    """float64 [M, S, E]."""
    return np.einsum("mk,sek->mse", _f64(x), _f64(layer.router))


def linear(
    layer: Layer,
    x: torch.Tensor,
    logits: torch.Tensor | np.ndarray | None = None,
    bias: torch.Tensor | None = None,
) -> np.ndarray:
    """y[M, N] in float64."""
    logits = logits_of(layer, x) if logits is None else np.asarray(logits, dtype=np.float64)
    power = np.exp(logits - logits.max(axis=-1, keepdims=True))
    gates = power / power.sum(axis=-1, keepdims=True)
    bits = np.unpackbits(layer.weight.numpy(), axis=1, bitorder="little")[:, : layer.K]
    signs = bits.astype(np.float64) * 2 - 1
    s_in, s_out = _f64(layer.s_in), _f64(layer.s_out)
    y = np.empty((x.shape[0], layer.N))
    first = 0
    for s, size in enumerate(layer.shard_sizes):
        rows = slice(first, first + size)
        scaled = _f64(x) * (gates[:, s] @ s_in[s])
        y[:, rows] = (scaled @ signs[rows].T) * (gates[:, s] @ s_out[:, rows])
        first += size
    return y if bias is None else y + _f64(bias)


def error(y: torch.Tensor, expected: np.ndarray) -> float:
    """||y - expected|| / ||expected||."""
    return float(np.linalg.norm(_f64(y) - expected) / np.linalg.norm(expected))


def _f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()
