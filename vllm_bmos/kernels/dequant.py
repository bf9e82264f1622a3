"""The layer on any GPU, with torch alone: dequantise a part of the signs, then the vendor GEMM.

It runs where the Triton kernels do not (older or other GPUs, float32 activations, no Triton), and
the Triton kernels are checked against it at load. Each call writes and reads the signs as floats,
a part at a time, so it is no faster than a dense layer; it keeps the memory saving. It rounds
where the Triton kernels and the authors' layer do, and its products too.
"""

import torch

from vllm_bmos.checkpoint.signs import unpack_signs
from vllm_bmos.kernels.base import Kernel, LinearConfig, LinearTensors
from vllm_bmos.kernels.reference import compute_dtype

PART_BYTES = 1 << 26  # of dequantised signs at a time
SIGN_SCALE = 2.0**-6
"""Signs are multiplied as +-2**-6, so that float16 products stay far from float16's overflow. It
is a power of two, hence exact."""


class DequantKernel(Kernel):
    """Dequantise and multiply, in torch."""

    name = "dequant"

    def can_run(self, config: LinearConfig) -> tuple[bool, str]:
        """On every device but the CPU."""
        if config.device == "cpu":
            return False, "for GPUs: on a CPU it is slower than the kernels made for it"
        return True, f"dequantises for the vendor GEMM on any {config.device} device"

    def router_logits(
        self, x: torch.Tensor, router_weight: torch.Tensor, shards: int
    ) -> torch.Tensor:
        """Float32 [M, S, E] from the checkpoint's router weights."""
        compute = compute_dtype(x.dtype)
        S, E, K = router_weight.shape
        logits = x.to(compute) @ router_weight.to(compute).view(S * E, K).T
        return logits.view(x.shape[0], S, E)

    def linear(
        self,
        x: torch.Tensor,
        logits: torch.Tensor | None,
        tensors: LinearTensors,
        bias: torch.Tensor | None,
        shard_sizes: list[int],
    ) -> torch.Tensor:
        """The layer; logits, gates, mixed scales, scaled x, products and y are of x's dtype."""
        compute = compute_dtype(x.dtype)
        if logits is None:
            logits = self.router_logits(x, tensors.router_weight, len(shard_sizes))
        M, K = x.shape
        # S tensors G[M, E]; a float32 x makes every rounding here void
        gates = rounded(rounded(logits, x).softmax(dim=-1), x).unbind(1)
        part = max(1, PART_BYTES // (K * x.element_size()))
        y = x.new_empty((M, sum(shard_sizes)))
        first = 0
        for G, S_in, size in zip(
            gates, tensors.in_channel_scale.unbind(), shard_sizes, strict=True
        ):
            scaled = (x.to(compute) * rounded(G @ S_in.to(compute), x)).to(x.dtype)
            for begin in range(first, first + size, part):
                rows = min(part, first + size - begin)
                signs = unpack_signs(tensors.weight.narrow(0, begin, rows), K, x.dtype)
                products = (scaled @ signs.mul_(SIGN_SCALE).T).to(compute)
                S_out = tensors.out_channel_scale.narrow(1, begin, rows).to(compute)
                out = products * (rounded(G @ S_out, x) / SIGN_SCALE)
                if bias is not None:
                    out = out + bias.narrow(0, begin, rows).to(compute)
                y.narrow(1, begin, rows).copy_(out)
            first += size
        return y


def rounded(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values as x's dtype holds them, in the dtype to compute with."""
    return values.to(x.dtype).to(compute_dtype(x.dtype))
