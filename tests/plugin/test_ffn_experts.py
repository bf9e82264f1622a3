"""The op of a mixture-of-experts layer, against float64 and against itself split over ranks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels import oracle
from vllm_bmos.kernels import LinearConfig, LinearTensors, kernels
from vllm_bmos.plugin import ffn_experts as module
from vllm_bmos.plugin.ffn_experts import ffn_experts

X, H, INNER, E, TOP_K = 4, 40, 24, 3, 2
KERNELS = ["cpu", "reference"]

Experts = list[tuple[oracle.Layer, oracle.Layer]]  # w13 and w2 of each


def experts_of(count: int = X) -> Experts:
    return [
        (
            oracle.random_layer((INNER, INNER), H, E, torch.float32, seed=2 * i),
            oracle.random_layer((H,), INNER, E, torch.float32, seed=2 * i + 1),
        )
        for i in range(count)
    ]


def stack(layers: list[oracle.Layer], kernel: str) -> list[torch.Tensor]:
    """The prepared tensors of one layer of each expert, stacked."""
    one = layers[0]
    config = LinearConfig(one.K, one.shard_sizes, one.E, torch.float32, torch.float32, "cpu")
    tensors = LinearTensors(
        torch.stack([layer.weight for layer in layers]),
        torch.stack([layer.s_in for layer in layers]),
        torch.stack([layer.s_out for layer in layers]),
        torch.stack([layer.router for layer in layers]),
    )
    ready = kernels()[kernel].prepare_stack(tensors, config)
    return [ready.weight, ready.in_channel_scale, ready.out_channel_scale, ready.router_weight]


def routing(M: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x[M, H], and the weights and numbers of the chosen experts; nobody chooses expert 2."""
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, H, generator=generator)
    chosen = torch.rand(M, X - 1, generator=generator).argsort(dim=1)[:, :TOP_K]
    ids = torch.tensor([0, 1, 3])[chosen]
    return x, torch.rand(M, TOP_K, generator=generator), ids.to(torch.int32)


def run(
    experts: Experts,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    kernel: str = "cpu",
    expert_map: torch.Tensor | None = None,
    partial_gates: int = 1,
    activation: str = "silu",
    weights_on_input: bool = False,
) -> torch.Tensor:
    w13, w2 = (stack([pair[i] for pair in experts], kernel) for i in (0, 1))
    inner = experts[0][1].K
    return ffn_experts(
        *(x, weights, ids, expert_map, w13, w2, kernel, kernel, inner),
        *(partial_gates, activation, weights_on_input),
    )


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def expected(
    experts: Experts,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation=silu,
    weights_on_input: bool = False,
) -> np.ndarray:
    """Token by token and expert by expert, in float64."""
    y = np.zeros(x.shape)
    for m in range(len(x)):
        for weight, i in zip(weights[m].tolist(), ids[m].tolist(), strict=True):
            token = x[m : m + 1].double() * (weight if weights_on_input else 1)
            gate, up = np.split(oracle.linear(experts[i][0], token), 2, axis=1)
            hidden = torch.from_numpy(activation(gate) * up)
            down = oracle.linear(experts[i][1], hidden)[0]
            y[m] += down * (1 if weights_on_input else weight)
    return y


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("M", [0, 1, 2, 17])
def test_float64(M: int, kernel: str) -> None:
    experts, inputs = experts_of(), routing(M)
    found = run(experts, *inputs, kernel=kernel)
    assert found.shape == (M, H)
    if M:
        assert oracle.error(found, expected(experts, *inputs)) < 1e-5


@pytest.mark.parametrize("activation", [silu, gelu, gelu_tanh])
def test_activations(activation) -> None:
    experts, inputs = experts_of(), routing(5)
    found = run(experts, *inputs, activation=activation.__name__)
    assert oracle.error(found, expected(experts, *inputs, activation)) < 1e-5


def test_weights_on_the_input() -> None:
    experts, (x, weights, ids) = experts_of(), routing(5)
    inputs = x, weights[:, :1], ids[:, :1]
    found = run(experts, *inputs, weights_on_input=True)
    assert oracle.error(found, expected(experts, *inputs, weights_on_input=True)) < 1e-5


def test_a_token_has_the_same_bits_in_every_batch() -> None:
    experts, (x, weights, ids) = experts_of(), routing(17)
    found = run(experts, x, weights, ids)
    for m in range(17):
        one = run(experts, x[m : m + 1], weights[m : m + 1], ids[m : m + 1])
        assert torch.equal(one[0], found[m])


def test_experts_of_other_ranks_and_none_add_nothing() -> None:
    experts, (x, weights, ids) = experts_of(), routing(17)
    maps = torch.tensor([[-1, 0, -1, 1], [0, -1, 1, -1]], dtype=torch.int32)
    parts = [
        run([experts[i] for i in mine], x, weights, ids, expert_map=expert_map)
        for mine, expert_map in zip(([1, 3], [0, 2]), maps, strict=True)
    ]
    assert oracle.error(parts[0] + parts[1], expected(experts, x, weights, ids)) < 1e-5
    ids[3] = -1
    assert not run(experts, x, weights, ids)[3].any()
    assert not run(experts[:2], x, weights, ids, expert_map=maps[1])[3].any()


def split_down(layer: oracle.Layer, rank: int) -> oracle.Layer:
    """One of three ranks' part of a layer that is split along K."""
    K = layer.K // 3
    columns = slice(rank * K, rank * K + K)
    return oracle.Layer(
        layer.shard_sizes,
        K,
        layer.weight[:, rank * K // 8 : (rank + 1) * K // 8].contiguous(),
        layer.s_in[:, :, columns].contiguous(),
        layer.s_out,
        layer.router[:, :, columns].contiguous(),
    )


def split_up(layer: oracle.Layer, rank: int) -> oracle.Layer:
    """One of three ranks' part of a merged layer that is split along N."""
    size = INNER // 3
    rows = [s * INNER + rank * size + n for s in range(2) for n in range(size)]
    s_out = layer.s_out[:, rows].contiguous()
    return oracle.Layer(
        (size, size), H, layer.weight[rows].contiguous(), layer.s_in, s_out, layer.router
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capturing", [False, True])
def test_three_ranks_add_up_logits_of_one_shape_and_results(
    kernel: str, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, inputs = experts_of(), routing(17)
    monkeypatch.setattr(module, "_capturing", lambda x: capturing)
    ranks = [[(split_up(w13, r), split_down(w2, r)) for w13, w2 in experts] for r in range(3)]
    sent: list[torch.Tensor] = []

    def send(logits: torch.Tensor) -> torch.Tensor:
        sent.append(logits.clone())
        return logits

    monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", send)
    for rank in ranks:
        run(rank, *inputs, kernel=kernel, partial_gates=E)
    total = sent[0] + sent[1] + sent[2]
    monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", lambda logits: total)
    parts = [run(rank, *inputs, kernel=kernel, partial_gates=E) for rank in ranks]
    assert oracle.error(parts[0] + parts[1] + parts[2], expected(experts, *inputs)) < 1e-5


def test_a_cuda_graph_computes_the_same_without_asking_who_got_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts, (x, weights, ids) = experts_of(), routing(17)
    ids[3], ids[4, 1] = -1, -1
    expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    plain = run(experts, x, weights, ids)
    mapped = run(experts[:2], x, weights, ids, expert_map=expert_map)
    monkeypatch.setattr(module, "_capturing", lambda x: True)
    monkeypatch.setattr(torch, "bincount", None)  # whose result would be read back
    torch.testing.assert_close(run(experts, x, weights, ids), plain)
    torch.testing.assert_close(run(experts[:2], x, weights, ids, expert_map=expert_map), mapped)


def test_in_a_cuda_graph_experts_that_were_not_chosen_may_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts, (x, weights, ids) = experts_of(), routing(17)
    w13, w2 = experts[2]
    experts[2] = replace(w13, s_out=torch.full_like(w13.s_out, 6e4)), w2
    x = x.half()
    assert not run(experts, x, weights, 0 * ids + 2).isfinite().all()
    plain = run(experts, x, weights, ids)
    monkeypatch.setattr(module, "_capturing", lambda x: True)
    assert plain.isfinite().all()
    torch.testing.assert_close(run(experts, x, weights, ids), plain, rtol=1e-2, atol=1e-2)


def test_op_contract() -> None:
    w13, w2 = (stack([pair[i] for pair in experts_of()], "cpu") for i in (0, 1))
    arguments = (*routing(5), None, w13, w2, "cpu", "cpu", INNER, 1, "silu", False)
    torch.library.opcheck(torch.ops.vllm_bmos.ffn_experts.default, arguments)
