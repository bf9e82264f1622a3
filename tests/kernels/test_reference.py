"""The reference kernel is the definition of the layer: against float64, and as a torch op."""

import pytest
import torch
from torch._dynamo.utils import counters

from vllm_bmos import ops
from vllm_bmos.checkpoint import pack_signs
from vllm_bmos.kernels import (
    KERNEL_ENV,
    LinearConfig,
    LinearTensors,
    choose_kernel,
    kernels,
)

# Odd sizes, no tokens, one of everything, unequal shards, more experts than four.
CASES = [
    (1, 8, [1], 1),
    (0, 16, [4], 4),
    (7, 21, [5, 3, 3], 4),
    (33, 64, [63], 8),
    (3, 1, [2, 1], 3),
]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def layer(K: int, sizes: list[int], E: int, seed: int = 0) -> tuple[LinearTensors, torch.Tensor]:
    """Random float32 tensors of a layer, and its signs as bool [N, K]."""
    torch.manual_seed(seed)
    S, N = len(sizes), sum(sizes)
    signs = torch.rand(N, K) < 0.5
    tensors = LinearTensors(
        weight=pack_signs(signs),
        in_channel_scale=torch.randn(S, E, K),
        out_channel_scale=torch.randn(E, N),
        router_weight=torch.randn(S, E, K),
    )
    return tensors, signs


def expected(
    x: torch.Tensor, tensors: LinearTensors, signs: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """One token, one output at a time, in float64: slow and obvious."""
    y = torch.zeros(x.shape[0], sum(sizes), dtype=torch.float64)
    for m, row in enumerate(x.double()):
        n = 0
        for s, size in enumerate(sizes):
            logits = tensors.router_weight[s].double() @ row
            gate = (logits - logits.max()).exp()
            gate = gate / gate.sum()
            scaled = row * (gate @ tensors.in_channel_scale[s].double())
            for _ in range(size):
                product = scaled[signs[n]].sum() - scaled[~signs[n]].sum()
                y[m, n] = product * (gate @ tensors.out_channel_scale[:, n].double())
                n += 1
    return y


def run(
    x: torch.Tensor, tensors: LinearTensors, sizes: list[int], bias: torch.Tensor | None = None
) -> torch.Tensor:
    return ops.linear(
        x,
        None,
        tensors.weight,
        tensors.in_channel_scale,
        tensors.out_channel_scale,
        tensors.router_weight,
        bias,
        sizes,
        "reference",
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("M", "K", "sizes", "E"), CASES)
def test_against_float64(M: int, K: int, sizes: list[int], E: int, dtype: torch.dtype) -> None:
    tensors, signs = layer(K, sizes, E)
    x = torch.randn(M, K).to(dtype)
    y = run(x, tensors, sizes)
    assert y.dtype == dtype
    truth = expected(x, tensors, signs, sizes)
    scale = truth.abs().max() if M else 1
    assert (y.double() - truth).abs().le(TOLERANCE[dtype] * scale).all()


def test_one_hot_activations_decode_every_bit() -> None:
    K, sizes = 21, [5, 3]
    tensors, signs = layer(K, sizes, E=1)  # whose gate is exactly 1
    ones = LinearTensors(
        tensors.weight,
        torch.ones_like(tensors.in_channel_scale),
        torch.ones_like(tensors.out_channel_scale),
        tensors.router_weight,
    )
    assert torch.equal(run(torch.eye(K), ones, sizes), torch.where(signs, 1.0, -1.0).T)


def test_bias_is_added_and_partial_logits_sum_to_the_whole() -> None:
    K, sizes, E = 32, [6, 2], 4
    tensors, _ = layer(K, sizes, E)
    x, bias = torch.randn(5, K), torch.randn(8)
    torch.testing.assert_close(
        run(x, tensors, sizes, bias), run(x, tensors, sizes) + bias, rtol=1e-5, atol=1e-5
    )
    # Two ranks of a row-parallel layer: partial logits add up, then partial products do.
    halves = [slice(0, 16), slice(16, 32)]
    logits = sum(
        ops.router_logits(x[:, k], tensors.router_weight[..., k], 2, E, "reference") for k in halves
    )
    y = sum(
        ops.linear(
            x[:, k],
            logits,
            tensors.weight[:, k.start // 8 : k.stop // 8],
            tensors.in_channel_scale[..., k],
            tensors.out_channel_scale,
            tensors.router_weight[..., k],
            None,
            sizes,
            "reference",
        )
        for k in halves
    )
    torch.testing.assert_close(y, run(x, tensors, sizes), rtol=1e-4, atol=1e-4)


def test_op_contract() -> None:
    tensors, _ = layer(24, [4, 4], 4)
    x = torch.randn(3, 24)
    arguments = (
        x,
        None,
        tensors.weight,
        tensors.in_channel_scale,
        tensors.out_channel_scale,
        tensors.router_weight,
        torch.randn(8),
        [4, 4],
        "reference",
    )
    torch.library.opcheck(torch.ops.vllm_bmos.linear.default, arguments)
    torch.library.opcheck(
        torch.ops.vllm_bmos.router_logits.default, (x, tensors.router_weight, 2, 4, "reference")
    )


def test_compiles_to_one_graph_for_any_number_of_tokens() -> None:
    tensors, _ = layer(24, [4, 4], 4)
    compiled = torch.compile(
        lambda x: run(x, tensors, [4, 4]).relu(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    before = counters["stats"]["unique_graphs"]
    for M in (5, 7, 64):  # none is another size of the layer, which would be taken for it
        x = torch.randn(M, 24)
        assert torch.equal(compiled(x), run(x, tensors, [4, 4]).relu())
    assert counters["stats"]["unique_graphs"] == before + 1


CONFIG = LinearConfig(
    K=64, shard_sizes=(8,), E=4, dtype=torch.float32, scale_dtype=torch.float16, device="cpu"
)


def test_a_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL_ENV, "reference")
    assert choose_kernel(CONFIG).name == "reference"


@pytest.mark.parametrize(
    ("name", "message"), [("fast", "unknown kernel; the kernels are"), ("triton", "cannot run")]
)
def test_a_kernel_that_cannot_be_forced_says_why(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNEL_ENV, name)
    with pytest.raises(ValueError, match=message):
        choose_kernel(CONFIG)


def test_every_kernel_gives_a_reason() -> None:
    for kernel in kernels().values():
        _, reason = kernel.can_run(CONFIG)
        assert reason
