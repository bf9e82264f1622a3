"""The dequantising kernel against float64, on the CPU: it is torch alone."""

import pytest
import torch

from tests.kernels.triton.layers import (
    assert_close,
    config_of,
    exact,
    random_bias,
    random_layer,
    random_x,
    relative_error,
)
from vllm_bmos.kernels import dequant
from vllm_bmos.kernels.dequant import DequantKernel

KERNEL = DequantKernel()


@pytest.mark.parametrize("part_bytes", [1, 5000, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "shard_sizes", "E"), [(77, [130, 5], 3), (576, [192, 64, 64], 4)])
def test_against_both_oracles(monkeypatch, part_bytes, dtype, K, shard_sizes, E):
    monkeypatch.setattr(dequant, "PART_BYTES", part_bytes)
    config = config_of(K, shard_sizes, E, dtype)
    tensors, x, bias = random_layer(config), random_x(5, config), random_bias(config)
    y = KERNEL.linear(x, None, tensors, bias, shard_sizes)
    assert_close(y, x, tensors, bias, shard_sizes, vendor=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_activations(dtype):
    config = config_of(200, [70], 4, dtype, torch.float32)
    tensors, x = random_layer(config), random_x(3, config)
    y = KERNEL.linear(x, None, tensors, None, [70])
    assert y.dtype == dtype
    assert relative_error(y, exact(x, tensors, None, [70])) <= 1e-5


def test_given_logits_and_router():
    config = config_of(200, [70, 33], 3)
    tensors, x = random_layer(config), random_x(4, config)
    logits = KERNEL.router_logits(x, tensors.router_weight, 2)
    want = torch.einsum("mk,sek->mse", x.double(), tensors.router_weight.double())
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-5)
    y = KERNEL.linear(x, logits + 1.5 * logits.flip(-1), tensors, None, [70, 33])
    assert_close(y, x, tensors, None, [70, 33], logits + 1.5 * logits.flip(-1), vendor=True)
    assert relative_error(y, exact(x, tensors, None, [70, 33])) > 0.01


def test_float16_products_do_not_overflow():
    """Large equal inputs: their plain sum, 4096 * 30, would be infinite in float16."""
    config = config_of(4096, [8], 1)
    tensors = random_layer(config)
    weight = torch.full_like(tensors.weight, 255)
    ones = torch.ones_like(tensors.in_channel_scale)
    tensors = type(tensors)(weight, ones, 0 * tensors.out_channel_scale + 0.125, ones * 0)
    y = KERNEL.linear(torch.full((1, 4096), 30.0).half(), None, tensors, None, [8])
    assert torch.equal(y, torch.full((1, 8), 15360.0).half())


def test_it_is_for_gpus():
    assert KERNEL.can_run(config_of(64, [64], device="cuda"))[0]
    able, reason = KERNEL.can_run(config_of(64, [64]))
    assert not able and "CPU" in reason
