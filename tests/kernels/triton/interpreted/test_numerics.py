"""Every kernel and every tile of the table against two oracles, with all padding poisoned."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.triton.layers import (
    OFFICIAL_BAR,
    assert_close,
    config_of,
    exact,
    flip_bit,
    official,
    random_bias,
    random_layer,
    random_x,
    relative_error,
)
from vllm_bmos.checkpoint.signs import unpack_signs
from vllm_bmos.kernels.triton import TritonKernel, configs, launch

DTYPES = (torch.float16, torch.bfloat16)
TILES = sorted({tile for tiles in configs.table().values() for tile in tiles}, key=str)
KERNEL = TritonKernel()


def run(config, M, *, bias=False, seed=0, tensors=None, x=None):
    """(y, what an oracle takes), with the bits behind K and the padded rows set at random."""
    tensors = tensors or random_layer(config, seed)
    x = random_x(M, config, seed + 1) if x is None else x
    added = random_bias(config) if bias else None
    prepared = poisoned_padding(KERNEL.prepare(tensors, config), config)
    y = KERNEL.linear(x, None, prepared, added, list(config.shard_sizes))
    return y, (x, tensors, added, config.shard_sizes)


def poisoned_padding(prepared, config):
    """Random signs wherever the layer has none."""
    words = prepared.weight.view(torch.uint8).clone()
    real = torch.zeros_like(words)
    row = 0
    mask = torch.zeros(words.shape[1], dtype=torch.uint8)
    mask[: config.K // 8] = 255
    if config.K % 8:
        mask[config.K // 8] = (1 << config.K % 8) - 1
    for size in config.shard_sizes:
        real[row : row + size] = mask
        row += launch.round_up(size, 128)
    assert row == words.shape[0]
    noise = torch.randint(256, words.shape, dtype=torch.uint8)
    words = (words & real) | (noise & ~real)
    return replace(prepared, weight=words.view(torch.int16))


@pytest.fixture
def use_tile(monkeypatch):
    """Serve every M with one tile (None: with the vendor GEMM)."""

    def use(tile):
        monkeypatch.setattr(launch, "tile_for", lambda arch, M: tile)

    return use


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("K", "shard_sizes", "E", "M", "bias"),
    [
        (576, [576, 192, 192], 4, 3, False),
        (200, [300], 3, 2, True),
        (1040, [320], 1, 17, True),
        (1376, [100, 60], 4, 1, True),
        (64, [1], 2, 9, False),
        (77, [130, 5], 5, 1, True),
        (333, [40], 9, 5, False),
        (1500, [129, 257, 3], 4, 8, False),
        (256, [200, 100], 4, 70, True),
    ],
)
def test_against_both_oracles(poison, dtype, K, shard_sizes, E, M, bias):
    y, layer = run(config_of(K, shard_sizes, E, dtype), M, bias=bias)
    assert_close(y, *layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [*TILES, None], ids=str)
def test_every_tile(poison, use_tile, dtype, tile):
    use_tile(tile)
    M = 19 if tile is None or tile.BM < 64 else 70
    y, layer = run(config_of(1376, [100, 60], 3, dtype), M, bias=True)
    assert_close(y, *layer, vendor=tile is None)


@pytest.mark.parametrize("tile", [*TILES, None], ids=str)
def test_no_access_behind_a_buffer(guarded, use_tile, tile):
    """K and N that no block divides, in memory that ends with each tensor."""
    use_tile(tile)
    config = config_of(1144, [5, 3], 3)  # 72 words a row, one token's row a multiple of 16 bytes
    tensors, x, bias = random_layer(config), random_x(2, config), random_bias(config)
    prepared = KERNEL.prepare(tensors, config)
    fields = {name: guarded(tensor) for name, tensor in vars(prepared).items()}
    logits = KERNEL.router_logits(guarded(x), fields["router_weight"], 2)
    y = KERNEL.linear(guarded(x), logits, replace(prepared, **fields), guarded(bias), [5, 3])
    assert_close(y, x, tensors, bias, [5, 3], vendor=tile is None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vendor_gemm_in_parts(poison, use_tile, monkeypatch, dtype):
    use_tile(None)
    monkeypatch.setattr(launch, "DEQUANT_BYTES", 1)  # one block of rows at a time
    y, layer = run(config_of(576, [300, 130], 4, dtype), 6, bias=True)
    assert_close(y, *layer, vendor=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rounding_of_the_official_layer_counts(dtype):
    """The two oracles differ by more than the bar: meeting it takes the authors' roundings."""
    config = config_of(576, [192, 64], 4, dtype)
    y, layer = run(config, 4)
    assert relative_error(y, official(*layer)) <= OFFICIAL_BAR[dtype]
    assert relative_error(exact(*layer), official(*layer)) > OFFICIAL_BAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [8, 77, 128, 1040])
def test_one_hot_inputs_decode_the_signs(dtype, K):
    """With unit scales and x = e_k, y is column k of B exactly: no bit is lost or moved."""
    config = config_of(K, [37, 5], 2, dtype)
    tensors = random_layer(config)
    ones = replace(
        tensors,
        in_channel_scale=torch.ones_like(tensors.in_channel_scale),
        out_channel_scale=torch.ones_like(tensors.out_channel_scale),
        router_weight=torch.zeros_like(tensors.router_weight),
    )
    columns = torch.arange(K) if K == 77 else torch.tensor([*range(0, K, 1 + K // 8), K - 1])
    x = torch.eye(K, dtype=dtype)[columns]
    y, _ = run(config, len(columns), tensors=ones, x=x)
    assert torch.equal(y, unpack_signs(tensors.weight, K, dtype).T[columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_flipped_bit_is_detected(dtype):
    config = config_of(576, [96, 33], 4, dtype)
    tensors, x = random_layer(config), random_x(3, config)
    y, flipped = run(config, 3, tensors=flip_bit(tensors, row=101, k=575), x=x)
    want = official(x, tensors, None, config.shard_sizes)
    assert relative_error(y, want) > 3 * OFFICIAL_BAR[dtype]
    assert_close(y, *flipped)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 66])
def test_router_logits_and_given_logits(poison, dtype, M):
    config = config_of(333, [40, 24], 3, dtype)
    tensors, x = random_layer(config), random_x(M, config)
    prepared = KERNEL.prepare(tensors, config)
    logits = KERNEL.router_logits(x, prepared.router_weight, 2)
    want = torch.einsum("mk,sek->mse", x.double(), tensors.router_weight.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-5)
    # Logits that differ from the router's own, as those of the other ranks' inputs make them.
    other = (logits + torch.randn_like(logits)).contiguous()
    y = KERNEL.linear(x, other, prepared, None, [40, 24])
    assert_close(y, x, tensors, None, [40, 24], other)


def test_large_logits_do_not_overflow(poison):
    config = config_of(256, [64], 4)
    tensors = random_layer(config)
    steep = replace(tensors, router_weight=tensors.router_weight * 2000)
    y, layer = run(config, 2, tensors=steep)
    # Logits of some hundreds are rounded to multiples of 1/4: far from the definition.
    assert relative_error(y, official(*layer)) <= OFFICIAL_BAR[torch.float16]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_of_another_dtype(poison, scale_dtype):
    config = config_of(200, [70], 4, torch.float16, scale_dtype)
    y, layer = run(config, 3, bias=True)
    assert_close(y, *layer)


@pytest.mark.parametrize("first", [0, 1])
def test_strided_and_misaligned_inputs(first):
    config = config_of(200, [70], 4)
    wide = random_x(4, config_of(401, [1]))
    x = wide[:, first : first + 200]
    y, layer = run(config, 4, x=x)
    assert_close(y, *layer)


def test_no_tokens():
    config = config_of(200, [70], 4)
    prepared = KERNEL.prepare(random_layer(config), config)
    assert KERNEL.linear(torch.empty(0, 200).half(), None, prepared, None, [70]).shape == (0, 70)
    assert KERNEL.router_logits(torch.empty(0, 200).half(), prepared.router_weight, 1).shape == (
        0,
        1,
        4,
    )


def test_positive_inputs_keep_their_precision(poison):
    """Even bits are unpacked as 0 and 2: here their correction is largest."""
    config = config_of(4096, [32], 4)
    x = random_x(2, config).abs()
    y, layer = run(config, 2, x=x)
    assert_close(y, *layer)


def test_the_correction_is_of_rounded_inputs(poison):
    """Every x * s_in rounds down by almost half a unit: only the rounded ones cancel."""
    config = config_of(4096, [32], 1)
    tensors = random_layer(config)
    scale = torch.full_like(tensors.in_channel_scale, 1 + 2**-10)
    tensors = replace(tensors, in_channel_scale=scale)
    y, layer = run(config, 1, tensors=tensors, x=torch.full((1, 4096), 1 + 460 * 2**-10).half())
    assert_close(y, *layer)


def test_a_token_does_not_depend_on_its_batch(use_tile, monkeypatch):
    (tile,) = configs.table()["batch_invariant"]
    use_tile(tile)
    monkeypatch.setattr(launch, "batch_invariant", lambda: True)
    config = config_of(576, [96], 4)
    tensors, x = random_layer(config), random_x(70, config)
    prepared = KERNEL.prepare(tensors, config)
    batch = KERNEL.linear(x, None, prepared, None, [96])
    alone = KERNEL.linear(x[41:42], None, prepared, None, [96])
    assert torch.equal(batch[41:42], alone)
    logits = KERNEL.router_logits(x, prepared.router_weight, 1)
    assert torch.equal(logits[41:42], KERNEL.router_logits(x[41:42], prepared.router_weight, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [*range(1, 19), 31, 32, 33, 63, 64, 65, 70])
def test_every_small_batch(poison, dtype, M):
    y, layer = run(config_of(1100, [130, 40], 4, dtype), M, bias=bool(M % 2))
    assert_close(y, *layer)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [1, 2, 3, 7, 8, 9, 17, 256])
def test_every_number_of_experts(poison, dtype, E):
    y, layer = run(config_of(200, [70, 33], E, dtype), 3)
    assert_close(y, *layer)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [*TILES, None], ids=str)
@pytest.mark.parametrize(("K", "M"), [(1, 1), (15, 2), (127, 3), (129, 16), (1023, 17), (1025, 64)])
def test_every_tile_with_odd_inputs(poison, use_tile, dtype, tile, K, M):
    use_tile(tile)
    y, layer = run(config_of(K, [3, 140], 4, dtype), M, bias=True)
    assert_close(y, *layer, vendor=tile is None)
