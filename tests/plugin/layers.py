"""Tensors of a packed layer as a checkpoint holds them."""

import torch

from vllm_bmos.checkpoint import pack_signs
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT


def random_tensors(N: int, K: int, E: int, seed: int) -> dict[str, torch.Tensor]:
    """Of one layer, by their names in the format."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).half()

    return {
        WEIGHT: pack_signs(torch.randint(0, 2, (N, K), generator=generator).bool()),
        IN_SCALE: random(E, K),
        OUT_SCALE: random(E, N),
        ROUTER: random(E, K),
    }
