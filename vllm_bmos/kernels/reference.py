"""The definition of the layer, in torch, on any device. It unpacks the signs on every call.

Equations 3 and 4 of BinaryMoS (arXiv 2406.12311), for each logical shard of a merged layer:

    G[M,E] = softmax(x[M,K] @ R[E,K].T)
    y[M,N] = ((x * (G @ S_in[E,K])) @ B[N,K].T) * (G @ S_out[E,N]) + bias[N]

All of it is computed in float32 (float64 if x is float64), and y is rounded to x's dtype once.
"""

import torch
from typing_extensions import override

from vllm_bmos.checkpoint.signs import unpack_signs
from vllm_bmos.kernels.base import Kernel, LinearConfig, LinearTensors


class ReferenceKernel(Kernel):
    """Readable, exact, slow: the oracle of every other kernel."""

    name = "reference"

    @override
    def can_run(self, config: LinearConfig) -> tuple[bool, str]:
        return True, "always runs; unpacks the weights on every call, so it is slow"

    @override
    def router_logits(
        self, x: torch.Tensor, router_weight: torch.Tensor, shards: int
    ) -> torch.Tensor:
        compute = compute_dtype(x.dtype)
        return torch.einsum("mk,sek->mse", x.to(compute), router_weight.to(compute))

    @override
    def linear(
        self,
        x: torch.Tensor,
        logits: torch.Tensor | None,
        tensors: LinearTensors,
        bias: torch.Tensor | None,
        shard_sizes: list[int],
    ) -> torch.Tensor:
        compute = compute_dtype(x.dtype)
        if logits is None:
            logits = self.router_logits(x, tensors.router_weight, len(shard_sizes))
        G = logits.to(compute).softmax(dim=-1)  # [M, S, E]
        x32, K = x.to(compute), x.shape[1]
        S_out = tensors.out_channel_scale.to(compute).split(shard_sizes, dim=1)
        y = []
        for s, packed in enumerate(tensors.weight.split(shard_sizes)):
            s_in = G[:, s] @ tensors.in_channel_scale[s].to(compute)  # [M, K]
            s_out = G[:, s] @ S_out[s]  # [M, N_s]
            B = unpack_signs(packed, K, compute)  # [N_s, K]
            y.append(((x32 * s_in) @ B.T) * s_out)
        out = torch.cat(y, dim=1)
        return (out if bias is None else out + bias.to(compute)).to(x.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 activations, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
