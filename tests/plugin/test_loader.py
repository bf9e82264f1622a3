"""The plugin's weight loader: which part goes where, and what it refuses. No engine runs here."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from tests.plugin.layers import random_tensors
from vllm_bmos.checkpoint import BinaryMosConfig, FormatError
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, REQUIRED, ROUTER, WEIGHT
from vllm_bmos.plugin.linear import BinaryMosLinearMethod, check_split, output_slices
from vllm_bmos.plugin.loader import LayerLoader, Slice

K, E = 48, 3


def layer_tensors(N: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_tensors(N, K, E, seed)


def make_parameters(loader: LayerLoader) -> dict[str, torch.nn.Parameter]:
    N, S, k = sum(s.size for s in loader.outputs), len(loader.outputs), loader.inputs.size
    shapes = {
        WEIGHT: ((N, k // 8), torch.uint8),
        IN_SCALE: ((S, E, k), torch.float16),
        OUT_SCALE: ((E, N), torch.float16),
        ROUTER: ((S, E, k), torch.float16),
    }
    parameters = {}
    for name, (shape, dtype) in shapes.items():
        parameters[name] = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        parameters[name].bmos_suffix = name  # type: ignore[attr-defined]
    return parameters


def whole(size: int) -> Slice:
    return Slice(0, size, size)


def qkv_loader() -> LayerLoader:
    return LayerLoader(["q", "k", "v"], whole(K), [whole(8), whole(4), whole(4)], E, "float16")


def load_all(loader: LayerLoader, skip: tuple[str, str] | None = None) -> dict[str, torch.Tensor]:
    parameters = make_parameters(loader)
    for i, shard in enumerate("qkv"):
        for suffix, tensor in layer_tensors(loader.outputs[i].full, seed=i).items():
            if (shard, suffix) != skip:
                loader.weight_loader(parameters[suffix], tensor, shard)
    return dict(parameters)


def test_merged_shards_land_side_by_side() -> None:
    found = load_all(qkv_loader())
    shards = [layer_tensors(N, seed=i) for i, N in enumerate((8, 4, 4))]
    assert torch.equal(found[WEIGHT], torch.cat([s[WEIGHT] for s in shards]))
    assert torch.equal(found[OUT_SCALE], torch.cat([s[OUT_SCALE] for s in shards], dim=1))
    assert torch.equal(found[IN_SCALE], torch.stack([s[IN_SCALE] for s in shards]))
    assert torch.equal(found[ROUTER], torch.stack([s[ROUTER] for s in shards]))


def test_fused_on_disk_splits_rows_and_repeats_router_and_in_scale() -> None:
    # Rank 1 of 2 of a fused q/k/v of 8, 4 and 4 rows.
    outputs = [Slice(4, 4, 8), Slice(2, 2, 4), Slice(2, 2, 4)]
    loader = LayerLoader(["qkv"], whole(K), outputs, E, "float16")
    parameters, tensors = make_parameters(loader), layer_tensors(16)
    for suffix, tensor in tensors.items():
        loader.weight_loader(parameters[suffix], tensor)
    loader.check_complete()
    rows = [4, 5, 6, 7, 10, 11, 14, 15]
    assert torch.equal(parameters[WEIGHT], tensors[WEIGHT][rows])
    assert torch.equal(parameters[OUT_SCALE], tensors[OUT_SCALE][:, rows])
    for shard in range(3):
        assert torch.equal(parameters[IN_SCALE][shard], tensors[IN_SCALE])
        assert torch.equal(parameters[ROUTER][shard], tensors[ROUTER])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_row_parallel_takes_its_columns(rank: int) -> None:
    loader = LayerLoader(["down"], Slice(16 * rank, 16, K), [whole(5)], E, "float16")
    parameters, tensors = make_parameters(loader), layer_tensors(5)
    for suffix, tensor in tensors.items():
        loader.weight_loader(parameters[suffix], tensor)
    columns = slice(16 * rank, 16 * rank + 16)
    assert torch.equal(parameters[WEIGHT], tensors[WEIGHT][:, 2 * rank : 2 * rank + 2])
    assert torch.equal(parameters[IN_SCALE][0], tensors[IN_SCALE][:, columns])
    assert torch.equal(parameters[ROUTER][0], tensors[ROUTER][:, columns])
    assert torch.equal(parameters[OUT_SCALE], tensors[OUT_SCALE])


@pytest.mark.parametrize("suffix", REQUIRED)
@pytest.mark.parametrize("shard", ["q", "k", "v"])
def test_a_missing_shard_is_named(shard: str, suffix: str) -> None:
    loader = qkv_loader()
    load_all(loader, skip=(shard, suffix))
    with pytest.raises(FormatError, match=rf"{shard}\.{suffix} was not loaded"):
        loader.check_complete()


def test_a_doubled_shard_is_named_and_a_reload_is_not() -> None:
    loader = qkv_loader()
    load_all(loader)
    with pytest.raises(FormatError, match=r"q\.weight_packed was loaded twice"):
        load_all(loader)
    loader = qkv_loader()
    for _ in range(2):
        load_all(loader)
        loader.check_complete()


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (WEIGHT, lambda t: t[:-1], r"needs torch.uint8 \[5, 6\], found torch.uint8 \[4, 6\]"),
        (WEIGHT, lambda t: t.to(torch.int8), "found torch.int8"),
        (IN_SCALE, lambda t: t.float(), r"needs torch.float16 \[3, 48\], found torch.float32"),
        (ROUTER, lambda t: t[:2], r"found torch.float16 \[2, 48\]"),
        (OUT_SCALE, lambda t: t * float("nan"), "NaN or infinite"),
        (IN_SCALE, lambda t: t / 0, "NaN or infinite"),
    ],
)
def test_a_wrong_tensor_is_named(suffix: str, change: object, message: str) -> None:
    loader = LayerLoader(["mlp.down_proj"], whole(K), [whole(5)], E, "float16")
    tensor = change(layer_tensors(5)[suffix])  # type: ignore[operator]
    with pytest.raises(FormatError, match=rf"mlp\.down_proj\.{suffix}.*{message}"):
        loader.weight_loader(make_parameters(loader)[suffix], tensor)


def fake_layer(kind: type, rank: int, tp: int, **attributes: int) -> torch.nn.Module:
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    for name, value in {"tp_rank": rank, "tp_size": tp, **attributes}.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_ranks_cover_every_row_of_grouped_query_attention(tp: int) -> None:
    heads, kv_heads, size = 8, 2, 16
    replicas = max(1, tp // kv_heads)
    here = [heads // tp * size, max(1, kv_heads // tp) * size, max(1, kv_heads // tp) * size]
    rows: list[list[int]] = [[], [], []]
    for rank in range(tp):
        layer = fake_layer(QKVParallelLinear, rank, tp, num_kv_head_replicas=replicas)
        for shard, part in enumerate(output_slices(layer, here)):
            assert part.full == (heads if shard == 0 else kv_heads) * size
            rows[shard] += range(part.start, part.start + part.size)
    assert rows[0] == list(range(heads * size))
    for shard in (1, 2):
        assert sorted(rows[shard]) == sorted(list(range(kv_heads * size)) * replicas)


def test_a_column_parallel_rank_takes_its_rows() -> None:
    layer = fake_layer(ColumnParallelLinear, 3, 4)
    assert output_slices(layer, [10, 6]) == [Slice(30, 10, 40), Slice(18, 6, 24)]


@pytest.mark.feature(
    "Parallelism", "sizes that do not divide K", against="the error names the sizes"
)
def test_a_split_that_does_not_fit_names_the_sizes_that_do() -> None:
    layer = fake_layer(RowParallelLinear, 1, 2)
    config = BinaryMosConfig(1, ("down_proj",))
    method = BinaryMosLinearMethod(config, ["down_proj"], None, complete=False)
    message = r"down_proj: K=24 cannot be split .* Sizes that work for this layer: 1, 3"
    with pytest.raises(ValueError, match=message):
        method.create_weights(layer, 12, [8], 24, 8, torch.float32)  # type: ignore[arg-type]


def test_an_indivisible_split_names_the_sizes_that_work() -> None:
    check_split("o_proj", 576, 2)
    message = r"o_proj: K=576 cannot be split over --tensor-parallel-size 16.*1, 2, 3, 4, 6, 8, 9"
    with pytest.raises(ValueError, match=message):
        check_split("o_proj", 576, 16)


def test_nothing_is_copied_into_tensors_that_are_laid_out_for_a_kernel() -> None:
    prepared = torch.nn.Parameter(torch.zeros(16, K // 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^q: its tensors have been laid out .*reload_weights"):
        qkv_loader().weight_loader(prepared, layer_tensors(8)[WEIGHT], "q")


def test_a_wrong_shape_on_one_of_several_ranks_may_be_vllm_s_doing() -> None:
    wrong = layer_tensors(8)[WEIGHT]
    for part, said in [(Slice(0, 8, 16), "try one rank"), (whole(16), "convert the model again.$")]:
        loader = LayerLoader(["fc1"], whole(K), [part], E, "float16")
        with pytest.raises(FormatError, match=said):
            loader.load(torch.zeros(8, K // 8, dtype=torch.uint8), WEIGHT, wrong)
