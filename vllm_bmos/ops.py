"""The two ops of a BinaryMoS layer, `torch.ops.vllm_bmos.*`: schemas, fakes, and the dispatch.

    G[M,S,E] = softmax(logits[M,S,E])           logits = x[M,K] @ router_weight[S,E,K].T, fp32
    y[M,N_s] = ((x * (G_s @ S_in_s[E,K])) @ B_s[N_s,K].T) * (G_s @ S_out_s[E,N_s]) + bias

for the S logical shards of a merged layer, side by side in y[M,N]. There are two ops because a
row-parallel layer sees only a part of K: its partial logits are summed over the ranks before the
softmax. The tensors come from `Kernel.prepare` of the kernel that is named in the call.
"""

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


_library.impl("router_logits", _router_logits, "CompositeExplicitAutograd")
_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_bmos::router_logits", _router_logits_fake, lib=_library)
torch.library.register_fake("vllm_bmos::linear", _linear_fake, lib=_library)

router_logits = torch.ops.vllm_bmos.router_logits
linear = torch.ops.vllm_bmos.linear
