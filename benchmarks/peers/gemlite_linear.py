"""gemlite's Triton kernels with 1-bit weights: one scale an output, zero point one half."""

import importlib.util

import torch
from typing_extensions import override

from peers.base import Loaded, LoadedLayers, Mode, Peer, Weights


class Gemlite(Peer):
    """A plain product on the same signs; gemlite has no scales of the inputs."""

    name = "gemlite"
    devices = ("cuda",)

    @override
    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec("gemlite") else "gemlite is not installed"

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        fits = weights.K % 32 == 0 and weights.N % 32 == 0
        return [Mode("w1a16", "bf16", 1e-2, 1)] if weights.dtype != torch.float32 and fits else []

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        from gemlite.helper import A16Wn

        bits = (weights.signs(torch.int8) > 0).to(torch.uint8)
        scale = torch.full((weights.N, 1), 2 * weights.scale, dtype=weights.dtype)
        processor = A16Wn(device=weights.device, dtype=weights.dtype)
        return LoadedLayers(
            [
                # (bit - 0.5) * 2c is the sign times c.
                processor.from_weights(
                    bits.clone(), scale, torch.full_like(scale, 0.5), W_nbits=1,
                    group_size=weights.K,
                )
                for _ in range(copies)
            ]
        )  # fmt: skip
