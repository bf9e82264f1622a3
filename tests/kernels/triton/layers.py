"""Random layers, two oracles, and the error measure of the kernel tests."""

from dataclasses import replace

import torch

from vllm_bmos.checkpoint.signs import unpack_signs
from vllm_bmos.kernels.base import LinearConfig, LinearTensors

OFFICIAL_BAR = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Error over the largest output against the authors' layer, of which rounding y may be 4.9e-4 and
3.9e-3: what else differs is the order of float32 sums."""

DEFINITION_BAR = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
"""The same against the float64 definition: their roundings of gates and scales cost about this."""


def config_of(K, shard_sizes, E=4, dtype=torch.float16, scale_dtype=None, device="cpu"):
    return LinearConfig(K, tuple(shard_sizes), E, dtype, scale_dtype or dtype, device)


def random_layer(config: LinearConfig, seed: int = 0) -> LinearTensors:
    """A layer whose experts differ enough that a wrong gate, shard or scale shows."""
    generator = torch.Generator().manual_seed(seed)
    S, N, K, E = len(config.shard_sizes), config.N, config.K, config.E

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    weight = torch.randint(256, (N, -(-K // 8)), dtype=torch.uint8, generator=generator)
    if K % 8:
        weight[:, -1] &= (1 << K % 8) - 1
    return LinearTensors(
        weight=weight,
        in_channel_scale=(0.5 + uniform(S, E, K)).to(config.scale_dtype),
        out_channel_scale=(0.05 + 0.1 * uniform(E, N)).to(config.scale_dtype),
        router_weight=(4 * K**-0.5 * (uniform(S, E, K) - 0.5)).to(config.scale_dtype),
    )


def random_x(M: int, config: LinearConfig, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((M, config.K), generator=generator).to(config.dtype)


def random_bias(config: LinearConfig, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(config.N, generator=generator).to(config.dtype)


def exact(x, tensors, bias, shard_sizes, logits=None):
    """The definition in float64, written without the project's reference kernel."""
    return _layer(x, tensors, bias, shard_sizes, logits, lambda values: values)


def official(x, tensors, bias, shard_sizes, logits=None):
    """The layer rounded as the authors' BinaryMoSLinear rounds it, up to a float64 result.

    Logits, gates, both mixed scales and the scaled inputs are rounded to x's dtype. Their layer
    also rounds the products and the scaled products, where ours rounds only the sum with the bias.
    """
    return _layer(x, tensors, bias, shard_sizes, logits, lambda values: values.to(x.dtype).double())


def _layer(x, tensors, bias, shard_sizes, logits, rounded):
    x, columns = x.double(), []
    S_out = tensors.out_channel_scale.double().split(list(shard_sizes), dim=1)
    for s, packed in enumerate(tensors.weight.split(list(shard_sizes))):
        own = x @ tensors.router_weight[s].double().T
        G = rounded(torch.softmax(rounded(own if logits is None else logits[:, s].double()), -1))
        scaled = rounded(x * rounded(G @ tensors.in_channel_scale[s].double()))
        B = unpack_signs(packed, x.shape[1], torch.float64)
        columns.append((scaled @ B.T) * rounded(G @ S_out[s]))
    y = torch.cat(columns, dim=1)
    return y if bias is None else y + bias.double()


def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest output: NaN where y has one."""
    return float((y.double() - want.double()).abs().max() / want.double().abs().max())


def assert_close(
    y, x, tensors, bias, shard_sizes, logits=None, vendor=False, reordered=False
):  # fmt: skip
    """Within the bars of the authors' layer and of the definition.

    `vendor`: y comes from a vendor GEMM, which rounds its products to x's dtype as well.
    `reordered`: the logits' float32 sums have an order of their own. One of these layers has a
    logit that lies 1.7e-4 steps of float16 from where rounding changes; on the other side of it
    the error is 6.5e-4.
    """
    assert y.dtype == x.dtype
    slack = torch.finfo(x.dtype).eps / 2 if vendor else 0.0
    slack += OFFICIAL_BAR[x.dtype] / 2 if reordered else 0.0
    theirs = official(x, tensors, bias, shard_sizes, logits)
    error = relative_error(y, theirs)
    assert error <= OFFICIAL_BAR[x.dtype] + slack, f"{error:.2e} from the authors' layer"
    definition = exact(x, tensors, bias, shard_sizes, logits)
    assert relative_error(y, definition) <= DEFINITION_BAR[x.dtype] + slack


def flip_bit(tensors: LinearTensors, row: int, k: int) -> LinearTensors:
    weight = tensors.weight.clone()
    weight[row, k // 8] ^= 1 << (k % 8)
    return replace(tensors, weight=weight)
