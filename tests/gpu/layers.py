"""The kernel tests' random layers, moved to the GPU; oracles stay on the CPU."""

from dataclasses import replace
from functools import partial

import torch

from tests.gpu import DEVICE
from tests.kernels.triton import layers
from tests.kernels.triton.layers import random_bias, random_layer, random_x
from vllm_bmos.kernels.base import LinearConfig, LinearTensors
from vllm_bmos.kernels.triton import TritonKernel

KERNEL = TritonKernel()
assert_close = partial(layers.assert_close, reordered=True)
DTYPES = (torch.float16, torch.bfloat16)


def prepared(tensors: LinearTensors, config: LinearConfig) -> LinearTensors:
    """A layer of the CPU, on the GPU as the kernel wants it."""
    moved = LinearTensors(*(tensor.to(DEVICE) for tensor in tensors.in_order()))
    return KERNEL.prepare(moved, replace(config, device=DEVICE))


def run(config: LinearConfig, M: int, *, bias: bool = False, x=None, tensors=None):
    """(y of the GPU, what an oracle takes), both on the CPU. The kernel must repeat its bits."""
    tensors = tensors or random_layer(config)
    x = random_x(M, config) if x is None else x
    added = random_bias(config) if bias else None
    layer, x_gpu = prepared(tensors, config), x.to(DEVICE)
    added_gpu = None if added is None else added.to(DEVICE)
    sizes = list(config.shard_sizes)
    y = KERNEL.linear(x_gpu, None, layer, added_gpu, sizes)
    for _ in range(3):
        assert torch.equal(KERNEL.linear(x_gpu, None, layer, added_gpu, sizes), y)
    return y.cpu(), (x, tensors, added, config.shard_sizes)
