"""The ops of a BinaryMoS layer, `torch.ops.vllm_bmos.*`: schemas, fakes, and the dispatch.

    G[M,S,E] = softmax(logits[M,S,E])           logits = x[M,K] @ router_weight[S,E,K].T, fp32
    y[M,N_s] = ((x * (G_s @ S_in_s[E,K])) @ B_s[N_s,K].T) * (G_s @ S_out_s[E,N_s]) + bias

for the S logical shards of a merged layer, side by side in y[M,N]. The logits are an op of their
own because a row-parallel layer sees only a part of K: its partial logits are summed over the ranks
before the softmax. The tensors come from `Kernel.prepare` of the kernel that is named in the call.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_bmos.kernels import LinearTensors, kernels

__all__ = ["linear", "router_logits"]

_library = torch.library.Library("vllm_bmos", "FRAGMENT")
_library.define(
    "router_logits(Tensor x, Tensor router_weight, int shards, int experts, str kernel) -> Tensor"
)
_library.define(
    "linear(Tensor x, Tensor? logits, Tensor weight, Tensor in_channel_scale, "
    "Tensor out_channel_scale, Tensor router_weight, Tensor? bias, int[] shard_sizes, "
    "str kernel) -> Tensor"
)
# `linear` with the kernel "cpu", which knows the shards from the prepared weight. Its
# implementation is replaced by one in C++ where torch can call that (kernels/torch_op.py).
_library.define(
    "cpu_linear(Tensor x, Tensor? logits, Tensor weight, Tensor in_channel_scale, "
    "Tensor out_channel_scale, Tensor router_weight, Tensor? bias) -> Tensor"
)


def _router_logits(
    x: torch.Tensor, router_weight: torch.Tensor, shards: int, experts: int, kernel: str
) -> torch.Tensor:
    return kernels()[kernel].router_logits(x, router_weight, shards)


def _router_logits_fake(
    x: torch.Tensor, router_weight: torch.Tensor, shards: int, experts: int, kernel: str
) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], shards, experts), dtype=dtype)


def _linear(
    x: torch.Tensor,
    logits: torch.Tensor | None,
    weight: torch.Tensor,
    in_channel_scale: torch.Tensor,
    out_channel_scale: torch.Tensor,
    router_weight: torch.Tensor,
    bias: torch.Tensor | None,
    shard_sizes: list[int],
    kernel: str,
) -> torch.Tensor:
    tensors = LinearTensors(weight, in_channel_scale, out_channel_scale, router_weight)
    return kernels()[kernel].linear(x, logits, tensors, bias, shard_sizes)


def _linear_fake(
    x: torch.Tensor,
    logits: torch.Tensor | None,
    weight: torch.Tensor,
    in_channel_scale: torch.Tensor,
    out_channel_scale: torch.Tensor,
    router_weight: torch.Tensor,
    bias: torch.Tensor | None,
    shard_sizes: list[int],
    kernel: str,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], sum(shard_sizes)))


# All shards of a prepared weight count as one outside the kernel.
def _cpu_linear(*tensors: Any) -> torch.Tensor:
    N = tensors[4].shape[1]  # of out_channel_scale
    return _linear(*(*tensors, [N], "cpu"))


def _cpu_linear_fake(*tensors: Any) -> torch.Tensor:
    N = tensors[4].shape[1]
    return _linear_fake(*(*tensors, [N], "cpu"))


_library.impl("router_logits", _router_logits, "CompositeExplicitAutograd")
_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("cpu_linear", _cpu_linear, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_bmos::router_logits", _router_logits_fake, lib=_library)
torch.library.register_fake("vllm_bmos::linear", _linear_fake, lib=_library)
torch.library.register_fake("vllm_bmos::cpu_linear", _cpu_linear_fake, lib=_library)

router_logits = torch.ops.vllm_bmos.router_logits


def linear(
    x: torch.Tensor,
    logits: torch.Tensor | None,
    weight: torch.Tensor,
    in_channel_scale: torch.Tensor,
    out_channel_scale: torch.Tensor,
    router_weight: torch.Tensor,
    bias: torch.Tensor | None,
    shard_sizes: Sequence[int],
    kernel: str,
) -> torch.Tensor:
    """y[M, N] of x[M, K] and the tensors that the named kernel has prepared.

    Args:
        x: float32, float16 or bfloat16 [M, K].
        logits: float32 [M, S, E], or None: then they are computed from x.
        weight: the kernel's own, as are the next three.
        in_channel_scale: see `LinearTensors`.
        out_channel_scale: see `LinearTensors`.
        router_weight: see `LinearTensors`.
        bias: [N] or None.
        shard_sizes: outputs of each of the S logical shards.
        kernel: the name of the kernel.
    """
    scales = in_channel_scale, out_channel_scale, router_weight
    if kernel == "cpu":
        return torch.ops.vllm_bmos.cpu_linear(x.contiguous(), logits, weight, *scales, bias)
    return torch.ops.vllm_bmos.linear(x, logits, weight, *scales, bias, shard_sizes, kernel)
