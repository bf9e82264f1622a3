"""torch's own linear layer on dense weights: what a user has without any of this."""

from functools import partial

import torch
from typing_extensions import override

from peers.base import Loaded, LoadedLayers, Mode, Peer, Weights

_ARITHMETIC = {
    torch.bfloat16: Mode("bfloat16", "bf16", 4e-3, 16),
    torch.float16: Mode("float16", "bf16", 1e-3, 16),
    torch.float32: Mode("float32", "fp32", 1e-5, 32),
}


class TorchLinear(Peer):
    """`torch.nn.functional.linear` in the dtype of x."""

    name = "torch"
    devices = ("cpu", "cuda")

    @override
    def unavailable(self) -> str | None:
        return None

    @override
    def modes(self, weights: Weights) -> list[Mode]:
        return [_ARITHMETIC[weights.dtype]]

    @override
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        return LoadedLayers(
            [
                partial(torch.nn.functional.linear, weight=weights.dense.clone(), bias=None)
                for _ in range(copies)
            ]
        )
