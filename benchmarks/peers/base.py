"""What a peer is: a linear layer somebody could use instead, timed on the same signs.

Every peer computes the product x[M,K] @ (c * B[N,K]).T with c the power of two nearest to K**-0.5,
which each format holds without error; `vllm_bmos` computes the whole BinaryMoS layer on the same B.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from timing import Ring
from typing_extensions import override

from vllm_bmos.checkpoint.format import packed_width
from vllm_bmos.checkpoint.signs import unpack_signs
from vllm_bmos.kernels import LinearTensors
from vllm_bmos.kernels.reference import ReferenceKernel

SCALE_DTYPE = torch.float16


@dataclass(frozen=True)
class Weights:
    """Random weights of one layer shape, in the checkpoint's layout and as what peers load.

    Attributes:
        K: inputs.
        N: outputs.
        dtype: dtype of x and y.
        device: "cpu" or "cuda".
        packed: uint8 [N, ceil(K/8)], the signs.
    """

    K: int
    N: int
    dtype: torch.dtype
    device: str
    packed: torch.Tensor

    @classmethod
    def random(cls, K: int, N: int, dtype: torch.dtype, device: str, seed: int = 0) -> "Weights":
        """Fair coins for signs."""
        generator = torch.Generator().manual_seed(seed)
        shape = (N, packed_width(K))
        packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if K % 8:
            packed[:, -1] &= 2 ** (K % 8) - 1
        return cls(K, N, dtype, device, packed.to(device))

    @property
    def scale(self) -> float:
        """The c of the module's docstring: keeps y at about the size of x."""
        return 2.0 ** -round(math.log2(self.K) / 2)

    def signs(self, dtype: torch.dtype) -> torch.Tensor:
        """B[N, K] in `dtype`."""
        return unpack_signs(self.packed, self.K, dtype)

    @cached_property
    def dense(self) -> torch.Tensor:
        """The weight c * B[N, K] in the dtype of x."""
        return self.signs(self.dtype) * self.scale

    def activations(self, M: int, seed: int = 1) -> torch.Tensor:
        """x[M, K] from a normal distribution."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(M, self.K, generator=generator).to(self.device, self.dtype)

    def layer(self, E: int, seed: int = 2) -> LinearTensors:
        """A BinaryMoS layer on these signs, whose experts differ by 10 % and are really mixed."""
        generator = torch.Generator().manual_seed(seed)

        def around(center: float, size: int) -> torch.Tensor:
            values = center * (1 + 0.1 * torch.randn(E, size, generator=generator))
            return values.to(self.device, SCALE_DTYPE)

        router = torch.randn(E, self.K, generator=generator) * self.scale
        return LinearTensors(
            weight=self.packed,
            in_channel_scale=around(1.0, self.K).unsqueeze(0),
            out_channel_scale=around(self.scale, self.N),
            router_weight=router.unsqueeze(0).to(self.device, SCALE_DTYPE),
        )

    def product_truth(self, x: torch.Tensor) -> torch.Tensor:
        """The product x @ (c * B).T in float64."""
        return x.double() @ self._signs64.T * self.scale

    def layer_truth(self, x: torch.Tensor, E: int) -> torch.Tensor:
        """The BinaryMoS layer of `layer(E)` in float64."""
        return ReferenceKernel().linear(x.double(), None, self.layer(E), None, [self.N])

    @cached_property
    def _signs64(self) -> torch.Tensor:
        return self.signs(torch.float64)


class Loaded(ABC):
    """Copies of one layer, loaded the way the peer loads them."""

    @abstractmethod
    def ring(self, x: torch.Tensor, hot: bool) -> Ring:
        """Calls on x[M, K]: one for each copy, or on one copy only if hot."""


@dataclass(frozen=True)
class LoadedLayers(Loaded):
    """Copies that are functions of x."""

    layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]

    @override
    def ring(self, x: torch.Tensor, hot: bool) -> Ring:
        layers = self.layers[:1] if hot else self.layers
        return Ring([partial(layer, x) for layer in layers])


@dataclass(frozen=True)
class Mode:
    """One row of the tables: how a peer computes.

    Attributes:
        name: the `mode` of the JSON rows.
        arithmetic: which arithmetic limit its products are compared with: bf16, int8 or fp32.
        tolerance: largest ||y - truth|| / ||truth|| that passes for a right result.
        bits: bits that a weight takes in memory, for the bytes that a call must read.
    """

    name: str
    arithmetic: str
    tolerance: float
    bits: float


class Peer(ABC):
    """One provider of linear layers."""

    name: str
    devices: tuple[str, ...] = ("cpu",)

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this peer cannot run here, or None if it can."""

    @abstractmethod
    def modes(self, weights: Weights) -> list[Mode]:
        """The modes that this peer has for such a layer, possibly none."""

    @abstractmethod
    def load(self, weights: Weights, mode: Mode, copies: int, E: int) -> Loaded:
        """Load `copies` separate copies of the layer, with E of `experts`."""

    def experts(self, mode: Mode) -> tuple[int, ...]:
        """Expert counts that this peer knows; plain products have none and say 0."""
        return (0,)
