"""humming's CUDA kernels with 1-bit weights, which decode to -1 and 0.

A sign is 2*w + 1 for such a w, so the sum of each token's inputs is added to make the products
those of signs. A user would have to do the same.
"""

import importlib.util
from collections.abc import Callable

import torch
from typing_extensions import override

from peers.base import Loaded, LoadedLayers, Mode, Peer, Weights


class Humming(Peer):
    """A plain product on the same signs; humming has no scales of the inputs."""

    name = "humming"
    devices = ("cuda",)

    @override
    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec("humming") else "humming-kernels is not installed"

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        fits = weights.K % 128 == 0 and weights.N % 128 == 0
        return [Mode("w1a16", "bf16", 1e-2, 1)] if weights.dtype != torch.float32 and fits else []

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        return LoadedLayers([_layer(weights) for _ in range(copies)])


def _layer(weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=weights.N,
        shape_k=weights.K,
        weight_config={"dtype": "uint1"},
        torch_dtype=weights.dtype,
    ).to(weights.device)
    layer.load_from_unquantized((weights.signs(weights.dtype) - 1) * weights.scale)
    layer.transform()
    scale = weights.scale
    return lambda x: torch.add(layer(x), x.sum(dim=1, keepdim=True), alpha=scale)
