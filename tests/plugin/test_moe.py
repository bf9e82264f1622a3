"""Feed-forward experts as vLLM loads them: names, ranks, and what is refused. No engine here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe import MoEActivation, RoutedExperts

from tests.plugin.layers import random_tensors
from vllm_bmos.checkpoint import BinaryMosConfig, FormatError
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, REQUIRED, ROUTER, WEIGHT
from vllm_bmos.plugin import moe
from vllm_bmos.plugin.config import BinaryMosVllmConfig
from vllm_bmos.plugin.moe import BinaryMosMoEMethod
from vllm_bmos.plugin.versions import unsupported_cpu_moe

X, H, INNER, E = 4, 24, 32, 3
PREFIX = "model.layers.0.mlp.experts"
EP_RANKS = [[0, 3], [1, 2]]  # the experts of each rank of expert parallelism
LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
NAMES = [tuple(f"{PREFIX}.{i}.{leaf}" for leaf in LEAVES.values()) for i in range(X)]
ALL = [name for names in NAMES for name in names]


@pytest.fixture(autouse=True)
def any_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers load alike with a vLLM that could not run them on a CPU: on a GPU it can."""
    monkeypatch.setattr(moe, "unsupported_cpu_moe", lambda: None)


def experts_layer(ep_rank: int | None = None, **attributes: Any) -> RoutedExperts:
    """vLLM's layer with all experts, or with two of the four on a rank of expert parallelism."""
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    expert_map = None
    if ep_rank is not None:
        expert_map = torch.full((X,), -1, dtype=torch.int32)
        expert_map[EP_RANKS[ep_rank]] = torch.arange(2, dtype=torch.int32)
    layer.expert_map_manager = SimpleNamespace(
        map_global_to_local=lambda i: i if expert_map is None else expert_map[i].item()
    )
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name = "gate_proj", "up_proj"
    layer.ckpt_down_proj_name = "down_proj"
    layer.activation = MoEActivation.SILU
    layer.moe_config = moe_config()
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def moe_config(**values: Any) -> Any:
    ranks = {"tp_size": 1, "tp_rank": 0, "dp_size": 1, "pcp_size": 1}
    usual = {"num_logical_experts": X, "has_bias": False, "swiglu_limit": None}
    return SimpleNamespace(**(ranks | usual | values))


def built(
    layer: RoutedExperts, tp_size: int = 1, tp_rank: int = 0, count: int = X, **config: Any
) -> BinaryMosMoEMethod:
    ranks = moe_config(tp_size=tp_size, tp_rank=tp_rank, **config.pop("moe", {}))
    quantization = BinaryMosConfig(E, tuple(ALL), **config)
    method = BinaryMosMoEMethod(quantization, ranks, NAMES, complete=True)
    method.create_weights(layer, count, H, config.get("inner", INNER) // tp_size, torch.float32)
    return method


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    N, K = (H, INNER) if name.endswith("down_proj") else (INNER, H)
    return random_tensors(N, K, E, seed=ALL.index(name))


def load(layer: RoutedExperts, skip: str = "") -> list[int]:
    """Every tensor as vLLM hands it out; the experts that the layer said it took."""
    taken = set()
    for i, names in enumerate(NAMES):
        for (shard, _), name in zip(LEAVES.items(), names, strict=True):
            for suffix, tensor in tensors_of(name).items():
                own = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
                parameter = getattr(layer, own)
                if f"{name}.{suffix}" == skip:
                    continue
                if parameter.weight_loader(
                    param=parameter,
                    loaded_weight=tensor,
                    weight_name=f"{PREFIX}.{own}",
                    shard_id=shard,
                    expert_id=i,
                    return_success=True,
                ):
                    taken.add(i)
    return sorted(taken)


def test_every_tensor_lands_in_its_place() -> None:
    layer = experts_layer()
    built(layer)
    assert load(layer) == [0, 1, 2, 3]
    for i, (gate, up, down) in enumerate(NAMES):
        gate_, up_, down_ = tensors_of(gate), tensors_of(up), tensors_of(down)
        for suffix, merge in ((WEIGHT, torch.cat), (IN_SCALE, torch.stack), (ROUTER, torch.stack)):
            found = getattr(layer, f"w13_{suffix}")[i]
            assert torch.equal(found, merge([gate_[suffix], up_[suffix]]))
        merged = torch.cat([gate_[OUT_SCALE], up_[OUT_SCALE]], dim=1)
        assert torch.equal(layer.w13_out_channel_scale[i], merged)
        assert torch.equal(layer.w2_weight_packed[i], down_[WEIGHT])
        assert torch.equal(layer.w2_in_channel_scale[i, 0], down_[IN_SCALE])
        assert torch.equal(layer.w2_out_channel_scale[i], down_[OUT_SCALE])
        assert torch.equal(layer.w2_router_weight[i, 0], down_[ROUTER])


def test_a_tensor_parallel_rank_takes_rows_of_gate_and_up_and_columns_of_down() -> None:
    layer = experts_layer()
    built(layer, tp_size=2, tp_rank=1)
    load(layer)
    for i, (gate, up, down) in enumerate(NAMES):
        rows = slice(INNER // 2, INNER)
        weights = [tensors_of(name)[WEIGHT][rows] for name in (gate, up)]
        assert torch.equal(layer.w13_weight_packed[i], torch.cat(weights))
        assert torch.equal(layer.w13_in_channel_scale[i, 1], tensors_of(up)[IN_SCALE])
        assert torch.equal(layer.w2_weight_packed[i], tensors_of(down)[WEIGHT][:, 2:])
        assert torch.equal(layer.w2_router_weight[i, 0], tensors_of(down)[ROUTER][:, rows])
        assert torch.equal(layer.w2_out_channel_scale[i], tensors_of(down)[OUT_SCALE])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_expert_parallel_rank_takes_its_experts_whole(rank: int) -> None:
    layer = experts_layer(ep_rank=rank)
    method = built(layer, count=2)
    assert load(layer) == EP_RANKS[rank]
    for local, i in enumerate(EP_RANKS[rank]):
        gate, _, down = NAMES[i]
        assert torch.equal(layer.w13_weight_packed[local, :INNER], tensors_of(gate)[WEIGHT])
        assert torch.equal(layer.w2_weight_packed[local], tensors_of(down)[WEIGHT])
    method.process_weights_after_loading(layer)


@pytest.mark.parametrize("suffix", REQUIRED)
@pytest.mark.parametrize("leaf", LEAVES.values())
def test_a_missing_tensor_is_named(leaf: str, suffix: str) -> None:
    layer = experts_layer()
    method = built(layer)
    name = f"{PREFIX}.2.{leaf}.{suffix}"
    load(layer, skip=name)
    with pytest.raises(FormatError, match=f"^{name} was not loaded"):
        method.process_weights_after_loading(layer)


def test_a_split_that_does_not_fit_names_the_sizes_that_do() -> None:
    with pytest.raises(ValueError, match=r"0\.down_proj: K=32 cannot be split .* 1, 2, 4"):
        built(experts_layer(), tp_size=8)


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        ({"activation": MoEActivation.SWIGLUOAI}, {}, "activation 'swigluoai'"),
        ({}, {"moe": {"has_bias": True}}, "biases"),
        ({}, {"moe": {"swiglu_limit": 7.0}}, "swiglu_limit"),
        ({}, {"output_norm": "layer_norm"}, "output_norm"),
    ],
)
def test_what_cannot_be_served_is_named(
    layer: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"experts\.0\.gate_proj: .*{message}.*--ignore"):
        built(experts_layer(**layer), **config)


def test_experts_split_over_data_parallel_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj: .* --enable-expert-parallel"):
        built(experts_layer(), tp_size=2, moe={"dp_size": 2})
    built(experts_layer(), moe={"dp_size": 2})  # expert parallel: tp_size is 1


def claimed(modules: list[str]) -> Any:
    return BinaryMosVllmConfig(BinaryMosConfig(E, tuple(modules)))


def test_a_block_is_claimed_with_all_its_experts_or_not_at_all() -> None:
    method = claimed(ALL).get_quant_method(experts_layer(), PREFIX)
    assert isinstance(method, BinaryMosMoEMethod)
    assert method.names == NAMES and not method.complete  # no checkpoint was read
    assert claimed(["model.layers.1.x"]).get_quant_method(experts_layer(), PREFIX) is None
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj is not quantized while the rest is"):
        claimed([name for name in ALL if "3.up" not in name]).get_quant_method(
            experts_layer(), PREFIX
        )


def test_an_expert_with_a_bias_is_named() -> None:
    config = claimed(ALL)
    config.biases = {name: name == ALL[4] for name in ALL}
    with pytest.raises(FormatError, match=rf"^{ALL[4]}\.bias: "):
        config.get_quant_method(experts_layer(), PREFIX)


def test_a_vllm_without_a_token_router_for_cpus_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moe, "unsupported_cpu_moe", lambda: unsupported_cpu_moe("0.29.0+cpu"))
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj: .*>=0\.30\.0.*found vLLM 0\.29"):
        built(experts_layer())
