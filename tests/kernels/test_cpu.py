"""The CPU kernel on every instruction set of this machine, against float64 and against itself."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.kernels import oracle
from vllm_bmos import ops
from vllm_bmos.kernels import LinearConfig, LinearTensors, cpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

try:
    ISAS = cpu.isas()
except OSError as missing:
    pytest.skip(f"the library is not built: {missing}", allow_module_level=True)

# Half a unit in the last place of y, and what each mode adds to it for activations of one size.
ROUNDING = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-9}
MODE_ERROR = {"default": 2e-4, "exact": 5e-7, "int8": 1.5e-2}

# shard_sizes, K, E: odd sizes, and every edge of blocks of 32 rows, 64 weights and 512 of a slice.
SHAPES = [
    ((1,), 1, 1),
    ((63,), 8, 2),
    ((192,), 30, 8),
    ((5, 64, 33), 64, 3),
    ((577,), 65, 4),
    ((192, 63), 576, 1),
    ((63, 1, 192), 1376, 5),
    ((192,), 1537, 4),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    before = cpu.isa()
    assert cpu.library().bmos_use_isa(request.param.encode()) == 0
    assert cpu.isa() == request.param
    yield request.param
    cpu.library().bmos_use_isa(before.encode())


@pytest.fixture(params=["default", "exact", "int8"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each mode in turn, as the environment names it."""
    monkeypatch.setenv(cpu.MODE_ENV, request.param)
    return str(request.param)


def config_of(layer: oracle.Layer, dtype: torch.dtype) -> LinearConfig:
    return LinearConfig(layer.K, layer.shard_sizes, layer.E, dtype, layer.s_in.dtype, "cpu")


def prepare(layer: oracle.Layer, dtype: torch.dtype = F32) -> LinearTensors:
    tensors = LinearTensors(layer.weight, layer.s_in, layer.s_out, layer.router)
    return cpu.CpuKernel().prepare(tensors, config_of(layer, dtype))


def linear(
    layer: oracle.Layer,
    tensors: LinearTensors,
    x: torch.Tensor,
    logits: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Through the op, as the plugin calls it."""
    y = ops.linear(
        x,
        logits,
        tensors.weight,
        tensors.in_channel_scale,
        tensors.out_channel_scale,
        tensors.router_weight,
        bias,
        list(layer.shard_sizes),
        "cpu",
    )
    assert y.shape == (x.shape[0], layer.N)
    assert y.dtype == x.dtype
    return y


def random_x(M: int, K: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, K, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("shard_sizes", "K", "E"), SHAPES)
def test_matches_float64(
    isa: str, mode: str, shard_sizes: tuple[int, ...], K: int, E: int, dtype: torch.dtype
) -> None:
    layer = oracle.random_layer(shard_sizes, K, E)
    tensors = prepare(layer, dtype)
    for M in (1, 2, 3, 7, 16, 33, 70):
        x = random_x(M, K, dtype, seed=M)
        bias = random_x(1, layer.N, dtype)[0]
        y = linear(layer, tensors, x, bias=bias)
        bound = MODE_ERROR[mode] + ROUNDING[dtype]
        assert oracle.error(y, oracle.linear(layer, x, bias=bias)) < bound, f"M={M}"


def test_a_layer_keeps_the_mode_that_it_was_prepared_in(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = oracle.random_layer((192, 63), 576, 4), random_x(7, 576)
    prepared = {}
    for mode in MODE_ERROR:
        monkeypatch.setenv(cpu.MODE_ENV, mode)
        prepared[mode] = prepare(layer)
    monkeypatch.delenv(cpu.MODE_ENV)
    exact = oracle.linear(layer, x)
    error = {mode: oracle.error(linear(layer, t, x), exact) for mode, t in prepared.items()}
    assert error["int8"] > 1e-3 > error["default"] > 1e-6 > error["exact"]


@pytest.mark.parametrize("scale_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("bias_dtype", [BF16, F16, F32])
def test_every_scale_and_bias_dtype(
    isa: str, scale_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    layer = oracle.random_layer((37, 70), 200, 4, scale_dtype)
    tensors = prepare(layer)
    for M in (2, 40):
        x, bias = random_x(M, 200), random_x(1, 107, bias_dtype)[0] * 10
        y = linear(layer, tensors, x, bias=bias)
        assert oracle.error(y, oracle.linear(layer, x, bias=bias)) < 2e-4


@pytest.mark.parametrize("K", [70, 4096])
@pytest.mark.parametrize("outliers", [1, 4, 40])
def test_outlier_channels(isa: str, K: int, outliers: int) -> None:
    layer = oracle.random_layer((192,), K, 4)
    tensors = prepare(layer, BF16)
    x = random_x(20, K)
    x[:, :: K // outliers] *= 1000
    x = x.to(BF16)
    for some in (x[:1], x):
        assert oracle.error(linear(layer, tensors, some), oracle.linear(layer, some)) < 2e-3


def test_one_hot_activations_read_every_bit(isa: str, mode: str) -> None:
    K, shard_sizes = 130, (33, 65)
    layer = oracle.random_layer(shard_sizes, K, 1)
    ones = torch.ones_like
    layer = oracle.Layer(
        shard_sizes, K, layer.weight, ones(layer.s_in), ones(layer.s_out), layer.router
    )
    tensors = prepare(layer)
    y = linear(layer, tensors, torch.eye(K))
    bits = np.unpackbits(layer.weight.numpy(), axis=1, bitorder="little")[:, :K]
    assert np.array_equal(y.numpy().T > 0, bits == 1)
    assert torch.allclose(y.abs(), torch.ones(()), atol=1e-6)
    single = torch.cat([linear(layer, tensors, row[None]) for row in torch.eye(K)])
    assert torch.equal(single, y)


def test_a_row_has_the_same_bits_in_every_batch(isa: str, mode: str) -> None:
    layer = oracle.random_layer((70, 33), 1100, 4)
    tensors = prepare(layer, BF16)
    x = random_x(300, 1100, BF16)
    x[:, 7] *= 300
    y = linear(layer, tensors, x)
    for first, M in ((0, 1), (5, 2), (17, 3), (100, 4), (33, 5), (64, 16), (90, 33), (1, 290)):
        assert torch.equal(linear(layer, tensors, x[first : first + M]), y[first : first + M]), M


@pytest.mark.skipif("avx2" not in ISAS, reason="all other instruction sets pack alike")
def test_weights_packed_for_another_instruction_set_are_refused() -> None:
    layer, before = oracle.random_layer((40,), 70, 2), cpu.isa()
    try:
        cpu.library().bmos_use_isa(b"avx2")
        tensors = prepare(layer)
        cpu.library().bmos_use_isa(b"portable")
        with pytest.raises(ValueError, match="another instruction set; prepare it again"):
            linear(layer, tensors, random_x(1, 70))
    finally:
        cpu.library().bmos_use_isa(before.encode())


@pytest.mark.parametrize("M", [1, 3, 40])
def test_same_bits_on_every_instruction_set_and_number_of_threads(mode: str, M: int) -> None:
    layer = oracle.random_layer((100, 65, 3), 700, 4)
    x, results = random_x(M, 700), {}
    before, threads = cpu.isa(), torch.get_num_threads()
    try:
        for name in ISAS:
            cpu.library().bmos_use_isa(name.encode())
            tensors = prepare(layer)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results[name, count] = linear(layer, tensors, x)
    finally:
        cpu.library().bmos_use_isa(before.encode())
        torch.set_num_threads(threads)
    expected = results["portable", 1]
    assert [key for key, y in results.items() if not torch.equal(y, expected)] == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("M", [3, 20])
def test_nan_and_infinity_stay_in_their_row(isa: str, mode: str, M: int, bad: float) -> None:
    layer = oracle.random_layer((70,), 200, 4)
    tensors = prepare(layer)
    x = random_x(M, 200)
    expected = linear(layer, tensors, x)
    x[1, 77] = bad
    y = linear(layer, tensors, x)
    assert y[1].isnan().all()
    others = torch.arange(M) != 1
    assert torch.equal(y[others], expected[others])


def test_zero_and_tiny_and_huge_activations(isa: str, mode: str) -> None:
    layer = oracle.random_layer((70,), 200, 4)
    tensors = prepare(layer)
    x = random_x(20, 200)
    x[0] = 0
    assert not linear(layer, tensors, x)[0].any()
    assert not linear(layer, tensors, x[:1]).any()
    for size in (2.0**-80, 2.0**100):
        # The logits of huge activations are huge too: give some.
        logits = torch.zeros(20, 1, 4)
        y = linear(layer, tensors, x[1:] * size, logits[1:])
        expected = oracle.linear(layer, x[1:], logits[1:]) * size
        assert oracle.error(y, expected) < MODE_ERROR[mode]


def test_the_largest_sums_do_not_overflow(isa: str, mode: str) -> None:
    K = cpu.MAX_K
    weight = torch.tensor([0, 255, 15], dtype=torch.uint8)[:, None].repeat(1, K // 8)
    ones = torch.ones(1, 1, K)
    layer = oracle.Layer((3,), K, weight, ones, torch.ones(1, 3), ones)
    tensors = prepare(layer)
    truth = torch.tensor([-K, K, 0.0])  # none, all and half of the signs are +1
    for x in (torch.ones(1, K), torch.ones(9, K), -torch.ones(1, K)):
        y = linear(layer, tensors, x)
        torch.testing.assert_close(y, x[:, :1] * truth, rtol=1e-6, atol=1e-3)


def test_float16_intermediates_do_not_overflow(isa: str) -> None:
    # x * s_in is up to 1.5 * 60000 and the sums are larger still, but y fits.
    layer = oracle.random_layer((64,), 512, 4)
    small = oracle.Layer(
        (64,), 512, layer.weight, layer.s_in, (layer.s_out / 2**10).half(), layer.router
    )
    x = torch.full((5, 512), 60000.0, dtype=F16)
    logits = torch.zeros(5, 1, 4)
    y = linear(small, prepare(small, F16), x, logits)
    assert oracle.error(y, oracle.linear(small, x, logits)) < 1e-3


def test_external_logits(isa: str) -> None:
    layer = oracle.random_layer((70, 33), 200, 4)
    tensors = prepare(layer)
    for M in (1, 6, 40):
        x, logits = random_x(M, 200), random_x(M, 8).view(M, 2, 4) * 3
        y = linear(layer, tensors, x, logits)
        assert oracle.error(y, oracle.linear(layer, x, logits)) < 2e-4


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_router_logits(isa: str, dtype: torch.dtype) -> None:
    layer = oracle.random_layer((8, 8), 1537, 5)
    tensors = prepare(layer, dtype)
    for M in (0, 1, 6, 40):
        x = random_x(M, 1537, dtype)
        logits = ops.router_logits(x, tensors.router_weight, 2, 5, "cpu")
        assert logits.dtype == F32
        assert np.allclose(logits.numpy(), oracle.logits_of(layer, x), rtol=1e-5, atol=1e-5)
        # The layer computes the same ones.
        y = linear(layer, tensors, x)
        assert torch.equal(linear(layer, tensors, x, logits), y)


def test_router_logits_are_float32_whatever_torchs_default_is() -> None:
    layer = oracle.random_layer((8, 8), 200, 4)
    tensors, x = prepare(layer, BF16), random_x(3, 200, BF16)
    expected = ops.router_logits(x, tensors.router_weight, 2, 4, "cpu")
    torch.set_default_dtype(BF16)
    try:
        found = ops.router_logits(x, tensors.router_weight, 2, 4, "cpu")
    finally:
        torch.set_default_dtype(F32)
    assert found.dtype == F32 and torch.equal(found, expected)


@pytest.mark.parametrize("M", [3, 30])
def test_non_contiguous_activations(isa: str, M: int) -> None:
    layer = oracle.random_layer((70,), 200, 4)
    tensors = prepare(layer)
    wide = random_x(M, 400)
    for x in (wide[:, 100:300], wide[:, ::2], random_x(200, M).T):
        assert torch.equal(linear(layer, tensors, x), linear(layer, tensors, x.contiguous()))


def test_no_tokens(isa: str, mode: str) -> None:
    layer = oracle.random_layer((70,), 200, 4)
    assert linear(layer, prepare(layer), torch.empty(0, 200)).shape == (0, 70)


def test_packed_weights_have_the_size_of_the_checkpoint() -> None:
    layer = oracle.random_layer((4096,), 4096, 1)
    assert prepare(layer).weight.numel() == layer.weight.numel() + 64


def test_op_contract() -> None:
    layer = oracle.random_layer((70, 33), 200, 4)
    tensors = prepare(layer, BF16)
    for M in (1, 20):
        x = random_x(M, 200, BF16)
        arguments = (
            x,
            None,
            tensors.weight,
            tensors.in_channel_scale,
            tensors.out_channel_scale,
            tensors.router_weight,
            random_x(1, 103, BF16)[0],
            [70, 33],
            "cpu",
        )
        torch.library.opcheck(torch.ops.vllm_bmos.linear.default, arguments)
        torch.library.opcheck(
            torch.ops.vllm_bmos.router_logits.default, (x, tensors.router_weight, 2, 4, "cpu")
        )


def test_a_stack_is_its_layers_on_aligned_addresses() -> None:
    layers = [oracle.random_layer((40, 9), 72, 3, seed=i) for i in range(3)]
    columns = zip(*((i.weight, i.s_in, i.s_out, i.router) for i in layers), strict=True)
    tensors = LinearTensors(*(torch.stack(column) for column in columns))
    stacked = cpu.CpuKernel().prepare_stack(tensors, config_of(layers[0], F32)).unstacked()
    for layer, found in zip(layers, stacked, strict=True):
        expected = prepare(layer)
        assert found.weight.data_ptr() % 64 == 0
        assert torch.equal(found.weight, expected.weight)
        x = torch.randn(3, 72)
        assert torch.equal(linear(layer, found, x), linear(layer, expected, x))
