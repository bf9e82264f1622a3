"""What a kernel is: one signature, one way to say if it can run, one way to prepare weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearConfig:
    """What a kernel must know to say whether it can run a layer.

    A merged layer (q/k/v, gate/up) has S logical shards that share x but have their own router and
    scales; a plain layer has one.

    Attributes:
        K: inputs of the layer on this rank.
        shard_sizes: outputs of each logical shard on this rank; their sum is N.
        E: scaling experts.
        dtype: dtype of x and y.
        scale_dtype: dtype of the scales and router weights in the checkpoint.
        device: "cpu" or "cuda".
    """

    K: int
    shard_sizes: tuple[int, ...]
    E: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device: str

    @property
    def N(self) -> int:
        """Outputs of the whole layer on this rank."""
        return sum(self.shard_sizes)


@dataclass(frozen=True)
class LinearTensors:
    """The tensors of one layer, in the checkpoint's layout or in a kernel's own.

    In the checkpoint's layout, with S shards stacked:

        weight             uint8 [N, ceil(K/8)]
        in_channel_scale   [S, E, K]
        out_channel_scale  [E, N]
        router_weight      [S, E, K]

    A kernel may re-lay each of them in `prepare`, as one tensor each, of about the same size.
    """

    weight: torch.Tensor
    in_channel_scale: torch.Tensor
    out_channel_scale: torch.Tensor
    router_weight: torch.Tensor

    def in_order(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tensors as the format lists them (`checkpoint.format.REQUIRED`)."""
        return self.weight, self.in_channel_scale, self.out_channel_scale, self.router_weight

    def unstacked(self) -> list["LinearTensors"]:
        """The layers of a stack, whose tensors have one more dimension in front, as views."""
        return [LinearTensors(*layer) for layer in zip(*self.in_order(), strict=True)]


class Kernel(ABC):
    """One implementation of the layer. Instances hold no state: layers hold their tensors."""

    name: str

    @abstractmethod
    def can_run(self, config: LinearConfig) -> tuple[bool, str]:
        """Whether this kernel runs such a layer here, and why (or why not)."""

    def prepare(self, tensors: LinearTensors, config: LinearConfig) -> LinearTensors:
        """Re-lay a layer's tensors once after loading; by default they stay as they are."""
        return tensors

    def prepare_stack(self, tensors: LinearTensors, config: LinearConfig) -> LinearTensors:
        """`prepare` every layer of a stack of layers of one shape; the result is a stack, too."""
        layers = [self.prepare(layer, config).in_order() for layer in tensors.unstacked()]
        return LinearTensors(*(torch.stack(part) for part in zip(*layers, strict=True)))

    @abstractmethod
    def router_logits(
        self, x: torch.Tensor, router_weight: torch.Tensor, shards: int
    ) -> torch.Tensor:
        """x[M, K] against prepared router weights: fp32 [M, S, E]. See `ops.router_logits`."""

    @abstractmethod
    def linear(
        self,
        x: torch.Tensor,
        logits: torch.Tensor | None,
        tensors: LinearTensors,
        bias: torch.Tensor | None,
        shard_sizes: list[int],
    ) -> torch.Tensor:
        """The layer on x[M, K] with prepared tensors: y[M, N]. See `ops.linear`."""
