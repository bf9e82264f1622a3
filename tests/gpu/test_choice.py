"""Which kernel a layer on the GPU gets, and that the self-check at load tells right from wrong."""

from dataclasses import replace

import pytest
import torch

from tests.gpu import DEVICE, needs_gpu
from tests.gpu.layers import KERNEL, assert_close
from tests.kernels.triton.layers import config_of, random_layer, random_x
from vllm_bmos.kernels import LinearTensors, choose_kernel, kernels
from vllm_bmos.kernels.triton import TritonKernel, _tokens_to_try
from vllm_bmos.kernels.triton.selfcheck import SELFCHECK_ENV, passes

pytestmark = needs_gpu

SHAPES = [(4096, [4096]), (4096, [11008]), (11008, [4096])]
"""Those of benchmarks/linear.py, which finds the kernels compiled if it runs afterwards."""


@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize(("K", "shard_sizes"), SHAPES, ids=str)
def test_the_self_check_passes(monkeypatch, K, shard_sizes, E):
    monkeypatch.setenv(SELFCHECK_ENV, "error")
    config = config_of(K, shard_sizes, E, torch.float16, device=DEVICE)
    assert choose_kernel(config).name == "triton"


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_self_check_passes_in_bfloat16(monkeypatch, scale_dtype):
    monkeypatch.setenv(SELFCHECK_ENV, "error")
    config = config_of(4096, [4096, 1024, 1024], 4, torch.bfloat16, scale_dtype, DEVICE)
    assert choose_kernel(config).name == "triton"


def test_the_self_check_passes_if_batch_invariant(monkeypatch, batch_invariant):
    monkeypatch.setenv(SELFCHECK_ENV, "error")
    config = config_of(1144, [130, 5], 4, device=DEVICE)
    assert passes(KERNEL, config, _tokens_to_try(DEVICE)) is None


class FlippedBit(TritonKernel):
    def prepare(self, tensors, config):
        weight = tensors.weight.clone()
        weight[100, 3] ^= 4
        return super().prepare(replace(tensors, weight=weight), config)


def test_the_self_check_sees_one_flipped_bit(monkeypatch):
    monkeypatch.delenv(SELFCHECK_ENV, raising=False)
    config = config_of(1144, [130, 5], 4, device=DEVICE)
    reason = passes(FlippedBit(), config, (1, 9))
    assert reason is not None and "self-check failed: linear" in reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [3, 70])
def test_the_dequantising_kernel(dtype, M):
    """What the Triton kernels are compared with, against the oracles that know no GPU."""
    config = config_of(1144, [130, 5], 4, dtype, device=DEVICE)
    tensors, x = random_layer(config), random_x(M, config)
    moved = LinearTensors(*(tensor.to(DEVICE) for tensor in tensors.in_order()))
    y = kernels()["dequant"].linear(x.to(DEVICE), None, moved, None, [130, 5])
    assert_close(y.cpu(), x, tensors, None, [130, 5], vendor=True)


def test_float32_activations_get_the_dequantising_kernel():
    assert choose_kernel(config_of(64, [64], 4, torch.float32, device=DEVICE)).name == "dequant"
