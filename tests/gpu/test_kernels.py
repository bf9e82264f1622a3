"""The Triton kernels on silicon: unpacking, signs bit for bit, numbers, then odd shapes."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from tests.gpu import DEVICE, needs_gpu
from tests.gpu.layers import DTYPES, KERNEL, assert_close, prepared, run
from tests.kernels.triton.layers import (
    OFFICIAL_BAR,
    config_of,
    flip_bit,
    official,
    random_layer,
    random_x,
    relative_error,
)
from vllm_bmos.checkpoint.signs import unpack_signs
from vllm_bmos.kernels.triton import configs
from vllm_bmos.kernels.triton.signs import NATIVE, unpack_pair

pytestmark = needs_gpu

TILES = [*sorted({tile for tiles in configs.table().values() for tile in tiles}, key=str), None]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)


@triton.jit
def unpack_all(words, odd_out, even_out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(words + at)
    for p in tl.static_range(8):
        odd, even = unpack_pair(w, p, odd_out.dtype.element_ty, NATIVE)
        tl.store(odd_out + p * COUNT + at, odd)
        tl.store(even_out + p * COUNT + at, even)


@each_dtype
def test_the_inline_assembly_unpacks_every_word(dtype):
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    odd, even = torch.full((2, 8, len(words)), torch.nan, dtype=dtype, device=DEVICE)
    unpack_all[(64,)](words.to(DEVICE), odd, even, len(words), 1024)
    bits = words.to(torch.int32) >> torch.arange(0, 16, 2)[:, None]
    assert torch.equal(even.cpu(), (2 * (bits & 1)).to(dtype))
    assert torch.equal(odd.cpu(), (2 * (bits >> 1 & 1) - 1).to(dtype))


@each_tile
@each_dtype
def test_one_hot_inputs_decode_the_signs(poison, use_tile, dtype, tile):
    """With unit scales and x = e_k, y is column k of B exactly: no bit is lost or moved."""
    use_tile(tile)
    config = config_of(1144, [130, 5], 4, dtype)
    tensors = random_layer(config)
    ones = replace(
        tensors,
        in_channel_scale=torch.ones_like(tensors.in_channel_scale),
        out_channel_scale=torch.ones_like(tensors.out_channel_scale),
        router_weight=torch.zeros_like(tensors.router_weight),
    )
    y, _ = run(config, config.K, tensors=ones, x=torch.eye(config.K, dtype=dtype))
    assert torch.equal(y, unpack_signs(tensors.weight, config.K, dtype).T)


@each_tile
@each_dtype
def test_every_tile(poison, use_tile, dtype, tile):
    use_tile(tile)
    for M in (1, 19, 70):
        y, layer = run(config_of(1144, [130, 5], 4, dtype), M, bias=True)
        assert_close(y, *layer, vendor=tile is None)


@each_dtype
@pytest.mark.parametrize(
    ("K", "shard_sizes", "E", "Ms"),
    [
        (4096, [4096, 1024, 1024], 4, (1, 8, 9, 17, 100, 520)),
        (11008, [4096], 4, (1, 33)),
        (77, [1], 1, (1, 20, 600)),
        (200, [300, 40], 3, (2, 65)),
        (333, [40], 8, (5, 513)),
        (576, [576, 192, 192], 1, (3, 64)),
        (1040, [129, 257, 3], 9, (8, 700)),
    ],
    ids=str,
)
def test_layers(poison, dtype, K, shard_sizes, E, Ms):
    """Every path as M chooses it, the vendor GEMM from 512 on."""
    for M in Ms:
        y, layer = run(config_of(K, shard_sizes, E, dtype), M, bias=M % 2 == 0)
        assert_close(y, *layer, vendor=M > 511)


@each_dtype
def test_each_shard_has_its_own_experts(dtype):
    """The merged layer is its shards, each run alone, bit for bit."""
    config = config_of(1144, [130, 5], 4, dtype)
    tensors = random_layer(config)
    y, (x, *_) = run(config, 6, tensors=tensors)
    S_out = tensors.out_channel_scale.split([130, 5], dim=1)
    for s, weight in enumerate(tensors.weight.split([130, 5])):
        alone = replace(
            tensors,
            weight=weight,
            in_channel_scale=tensors.in_channel_scale[s : s + 1],
            out_channel_scale=S_out[s].contiguous(),
            router_weight=tensors.router_weight[s : s + 1],
        )
        own, _ = run(config_of(1144, [len(weight)], 4, dtype), 6, tensors=alone, x=x)
        assert torch.equal(y.split([130, 5], dim=1)[s], own)


@each_dtype
def test_one_flipped_bit_is_detected(dtype):
    config = config_of(1144, [130, 5], 4, dtype)
    tensors, x = random_layer(config), random_x(3, config)
    y, flipped = run(config, 3, tensors=flip_bit(tensors, row=131, k=1143), x=x)
    want = official(x, tensors, None, config.shard_sizes)
    assert relative_error(y, want) > 2 * OFFICIAL_BAR[dtype]
    assert_close(y, *flipped)


@each_dtype
@pytest.mark.parametrize("M", [1, 66])
def test_router_logits_and_given_logits(poison, dtype, M):
    config = config_of(1144, [130, 5], 4, dtype)
    tensors, x = random_layer(config), random_x(M, config)
    layer = prepared(tensors, config)
    logits = KERNEL.router_logits(x.to(DEVICE), layer.router_weight, 2)
    want = torch.einsum("mk,sek->mse", x.double(), tensors.router_weight.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.cpu().double(), want, rtol=1e-5, atol=1e-5)
    other = (logits + torch.randn_like(logits)).contiguous()
    y = KERNEL.linear(x.to(DEVICE), other, layer, None, [130, 5]).cpu()
    assert_close(y, x, tensors, None, [130, 5], other.cpu())


@each_dtype
def test_a_token_does_not_depend_on_its_batch(batch_invariant, dtype):
    config = config_of(4096, [96, 32], 4, dtype)
    layer, x = prepared(random_layer(config), config), random_x(1030, config).to(DEVICE)
    whole = KERNEL.linear(x, None, layer, None, [96, 32])
    logits = KERNEL.router_logits(x, layer.router_weight, 2)
    for first, count in ((0, 1), (41, 1), (1029, 1), (3, 7), (500, 16), (9, 65), (1, 600)):
        part = x[first : first + count]
        y = KERNEL.linear(part, None, layer, None, [96, 32])
        assert torch.equal(y, whole[first : first + count])
        found = KERNEL.router_logits(part, layer.router_weight, 2)
        assert torch.equal(found, logits[first : first + count])


def test_strided_and_misaligned_inputs():
    config = config_of(200, [300, 40], 3)
    wide = random_x(4, config_of(401, [1])).to(DEVICE)
    tensors = random_layer(config)
    layer = prepared(tensors, config)
    for first in (0, 1):
        x = wide[:, first : first + 200]
        y = KERNEL.linear(x, None, layer, None, [300, 40])
        assert_close(y.cpu(), x.cpu(), tensors, None, [300, 40])
