"""The launcher on fake CUDA tensors: grids by arithmetic, and nothing that a CUDA graph forbids."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_bmos import ops
from vllm_bmos.kernels.base import LinearTensors
from vllm_bmos.kernels.triton import TritonKernel, aot, launch
from vllm_bmos.kernels.triton.configs import tile_for

BATCHES = (1, 2, 7, 8, 9, 16, 17, 31, 63, 64, 65, 255, 511, 512, 513, 2048)
SHAPES = [(4096, (4096,)), (576, (576, 192, 192)), (1040, (300, 1, 129)), (11008, (4096, 4096))]

# What a captured launch may do besides launching: allocate, look at shapes, call the vendor GEMM.
ALLOWED = {
    "aten.empty", "aten.new_empty", "aten.view", "aten.select", "aten.unbind", "aten.slice",
    "aten.narrow",
    "aten.sum", "aten.t", "aten.transpose", "aten.mm", "aten.clone", "aten.detach",
    "aten.permute", "prim.device",
}  # fmt: skip


class CaptureLint(TorchDispatchMode):
    """Fails on every operation that could wait for the GPU or depend on its data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rsplit(".", 1)[0]
        assert name in ALLOWED, f"{name} is not known to be safe inside a CUDA graph"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_gpu(monkeypatch):
    def use(arch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: divmod(arch, 10))

    return use


def fake_layer(K, shard_sizes, E=4, dtype=torch.float16):
    """Fake tensors of a prepared layer; inside a FakeTensorMode."""
    S, N = len(shard_sizes), sum(shard_sizes)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda")

    loaded = LinearTensors(
        empty(N, -(-K // 8), dtype=torch.uint8), empty(S, E, K), empty(E, N), empty(S, E, K)
    )
    return launch.prepare(loaded, shard_sizes, K)


@pytest.mark.parametrize(("K", "shard_sizes"), SHAPES)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_capture_lint(on_gpu, arch, K, shard_sizes):
    on_gpu(arch)
    kernel, sizes = TritonKernel(), list(shard_sizes)
    with FakeTensorMode(), aot.recording() as launches:
        layer = fake_layer(K, shard_sizes)
        bias = torch.empty(sum(sizes), dtype=torch.float16, device="cuda")
        for M in BATCHES:
            x = torch.empty(M, K, dtype=torch.float16, device="cuda")
            with CaptureLint():
                logits = kernel.router_logits(x, layer.router_weight, len(sizes))
                y = kernel.linear(x, logits, layer, bias, sizes)
                kernel.linear(x, None, layer, None, sizes)
            assert y.shape == (M, sum(sizes)) and y.device.type == "cuda"
            assert logits.shape == (M, len(sizes), 4) and logits.dtype == torch.float32
    assert all(type(size) is int and size > 0 for recorded in launches for size in recorded.grid)


@pytest.mark.parametrize(
    "unsafe",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1, 2]).to(x.device),
        lambda x: x[x > 0],
    ],
)
def test_the_lint_catches_syncs(unsafe):
    with FakeTensorMode():
        x = torch.empty(4, 4, device="cuda")
        with pytest.raises(AssertionError, match="not known to be safe"), CaptureLint():
            unsafe(x)


def covers(extent, block, programs):
    """Whether blocks under a mask `< extent` touch every element, and none of them is idle."""
    return (programs - 1) * block < extent <= programs * block


@pytest.mark.parametrize(("K", "shard_sizes"), SHAPES)
@pytest.mark.parametrize("arch", [86, 100])
def test_grids_cover_every_output_once(on_gpu, arch, K, shard_sizes):
    on_gpu(arch)
    S, N = len(shard_sizes), sum(shard_sizes)
    padded = sum(launch.round_up(size, 128) for size in shard_sizes)
    with FakeTensorMode() as fake:
        layer = fake_layer(K, shard_sizes)
        whole = torch.empty(2048, K, dtype=torch.float16, device="cuda")
    for M in range(1, 2049, 1 if (K, arch) == (1040, 86) else 97):
        with fake, aot.recording() as launches:
            launch.linear(whole.narrow(0, 0, M), None, layer, None, list(shard_sizes))
        if M > launch.FEW_TOKENS:
            logits, route, *rest = launches
            assert logits.name == "logits" and logits.grid[1] == S * 4
            assert covers(M, logits.options["BT"], logits.grid[0])
            assert route.name == "scale" and route.grid[2] == -(-K // 1024)
        else:
            route, *rest = launches
            assert route.name == "route"
        assert route.grid[1] == S
        assert covers(M, route.options["BT"], route.grid[0])
        tile = tile_for(arch, M)
        if tile is not None:
            (gemm,) = rest
            assert gemm.grid[0] * tile.BN == padded == layer.weight.shape[0]
            assert covers(M, tile.BM, gemm.grid[1])
            assert 128 % tile.BN == 0, "a tile must not span two shards"
            continue
        columns = [0] * N
        for dequant, finish in zip(rest[::2], rest[1::2], strict=True):
            first, cols = finish.args[7:9]
            assert dequant.grid[0] * dequant.options["BN"] >= cols
            assert dequant.grid[1] == -(-K // 1024)
            assert covers(M, finish.options["BM"], finish.grid[1])
            assert covers(cols, finish.options["BN"], finish.grid[0])
            columns[first : first + cols] = [n + 1 for n in columns[first : first + cols]]
        assert columns == [1] * N


@pytest.mark.parametrize("M", [3, 100])
def test_given_logits_start_where_the_kernels_expect_it(on_gpu, M):
    """As some views of a mixture of experts do not, for which others would be compiled."""
    on_gpu(90)
    with FakeTensorMode(), aot.recording() as launches:
        layer = fake_layer(256, (300,), E=3)
        x = torch.empty(M, 256, dtype=torch.float16, device="cuda")
        views = torch.empty(1 + M, 1, 3, device="cuda").split([1, M])
        launch.linear(x, views[1], layer, None, [300])
    given = launches[0].args[1]
    assert launches[0].name in ("route", "scale") and given.shape == (M, 1, 3)
    assert given.storage_offset() % 4 == 0


def test_a_model_of_fake_cuda_tensors(on_gpu):
    """Two merged layers through the ops, as vLLM traces them before any kernel runs."""
    on_gpu(90)
    with FakeTensorMode(), aot.recording():
        qkv, down = fake_layer(256, (256, 64, 64)), fake_layer(384, (256,))
        x = torch.empty(33, 256, dtype=torch.float16, device="cuda")

        def call(x, layer, sizes):
            return ops.linear(
                x, None, layer.weight, layer.in_channel_scale, layer.out_channel_scale,
                layer.router_weight, None, sizes, "triton",
            )  # fmt: skip

        y = call(call(x, qkv, [256, 64, 64]), down, [256])
    assert y.shape == (33, 256) and y.device == torch.device("cuda", 0)


def test_prepare_pads_to_whole_blocks():
    weight = torch.full((5, 26), 255, dtype=torch.uint8)
    scale = torch.ones(2, 3, 201)
    tensors = LinearTensors(weight, scale, torch.ones(3, 5), scale)
    prepared = launch.prepare(tensors, (3, 2), 201)
    assert prepared.weight.shape == (256, 16) and prepared.weight.dtype == torch.int16
    rows = prepared.weight.view(torch.uint8)
    for first, size in ((0, 3), (128, 2)):
        assert (rows[first : first + size, :26] == 255).all()
        assert not rows[first + size : first + 128].any() and not rows[:, 26:].any()
    for padded in (prepared.in_channel_scale, prepared.router_weight):
        assert padded.shape == (2, 3, 256)
        assert (padded[..., :201] == 1).all() and not padded[..., 201:].any()
