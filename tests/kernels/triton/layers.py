"""Random layers, two oracles, and the error measure of the kernel tests."""

from dataclasses import replace

import torch

from vllm_bmos.checkpoint.signs import unpack_signs
from vllm_bmos.kernels.base import LinearConfig, LinearTensors

EPSILON = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


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


def exact(x, tensors, bias, shard_sizes, logits=None, round_inputs=True):
    """The layer in float64, written without the project's reference kernel.

    With `round_inputs`, x * s_in is rounded to x's dtype, as it must be for the tensor cores.
    """
    columns = []
    S_out = tensors.out_channel_scale.double().split(list(shard_sizes), dim=1)
    for s, packed in enumerate(tensors.weight.split(list(shard_sizes))):
        scores = (
            x.double() @ tensors.router_weight[s].double().T
            if logits is None
            else logits[:, s].double()
        )
        G = torch.softmax(scores, dim=-1)
        scaled = x.double() * (G @ tensors.in_channel_scale[s].double())
        if round_inputs:
            scaled = scaled.to(x.dtype).double()
        B = unpack_signs(packed, x.shape[1], torch.float64)
        columns.append((scaled @ B.T) * (G @ S_out[s]))
    y = torch.cat(columns, dim=1)
    return y if bias is None else y + bias.double()


def official(x, tensors, bias, shard_sizes):
    """The layer with the roundings of the authors' BinaryMoSLinear, but a float32 result.

    Router logits, gates, both mixed scales and the scaled input are rounded to x's dtype.
    """
    dtype, columns = x.dtype, []
    S_out = tensors.out_channel_scale.float().split(list(shard_sizes), dim=1)
    for s, packed in enumerate(tensors.weight.split(list(shard_sizes))):
        scores = (x.float() @ tensors.router_weight[s].float().T).to(dtype)
        G = torch.softmax(scores.float(), dim=-1).to(dtype).float()
        s_in = (G @ tensors.in_channel_scale[s].float()).to(dtype).float()
        s_out = (G @ S_out[s]).to(dtype).float()
        scaled = (x.float() * s_in).to(dtype).float()
        columns.append((scaled @ unpack_signs(packed, x.shape[1], torch.float32).T) * s_out)
    y = torch.cat(columns, dim=1)
    return y if bias is None else y + bias.float()


def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest output: NaN where y has one."""
    return float((y.double() - want.double()).abs().max() / want.double().abs().max())


def beyond_rounding(y: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest output, after what rounding y to its dtype may explain."""
    slack = want.double().abs() * EPSILON[y.dtype] / 2
    error = ((y.double() - want.double()).abs() - slack).nan_to_num(nan=torch.inf).clamp(min=0)
    return float(error.max() / want.double().abs().max())


def flip_bit(tensors: LinearTensors, row: int, k: int) -> LinearTensors:
    weight = tensors.weight.clone()
    weight[row, k // 8] ^= 1 << (k % 8)
    return replace(tensors, weight=weight)
