"""The LayerNorm that ends a OneBit layer (arXiv 2402.11295, equation 4); BinaryMoS has none.

    z[M,N_s] = (y_s - mean(y_s)) / sqrt(var(y_s) + eps) + bias[N_s]

for each logical shard s of a merged layer by itself.
"""

import torch

from vllm_bmos.checkpoint.format import LAYER_NORM_EPS


def output_layer_norm(
    y: torch.Tensor, bias: torch.Tensor | None, shard_sizes: list[int] | tuple[int, ...]
) -> torch.Tensor:
    """Normalise y[..., N] shard by shard, then add the bias [N]; in y's dtype."""
    shards = [
        torch.nn.functional.layer_norm(shard, (shard.shape[-1],), eps=LAYER_NORM_EPS)
        for shard in y.split(list(shard_sizes), dim=-1)
    ]
    z = torch.cat(shards, dim=-1)
    return z if bias is None else z + bias
