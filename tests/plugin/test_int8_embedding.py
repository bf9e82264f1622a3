"""Embeddings and lm_head in 8 bits: the integers, the product, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

from vllm_bmos.plugin import int8_embedding, narrow
from vllm_bmos.plugin.embedding import LeanEmbeddingMethod
from vllm_bmos.plugin.int8_embedding import (
    EMBEDDINGS_ENV,
    Int8EmbeddingMethod,
    int8_wanted,
    linear,
    quantize,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
# One that torch's kernel takes, with a part that is not whole; one that it would read beyond.
SHAPES = [(2 * narrow.ROWS + 64, 192), (narrow.ROWS + 1, 101)]


def table(N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 1, N).unsqueeze(1)
    return (torch.randn(N, K, generator=generator) * scale).to(dtype)


def values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double().unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    weight = table(narrow.ROWS + 3, 100, dtype)
    weight[5] = 0
    codes, scale = quantize(weight)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scale.dtype == (dtype if dtype == torch.bfloat16 else torch.float32)
    largest = weight.abs().amax(1, keepdim=True).double()
    off = (values(codes, scale) - weight.double()).abs()
    # Where bfloat16 rounds a scale down, the largest weight of the row lacks up to 1 / 256 of it.
    assert (off <= torch.maximum(0.502 * scale.double().unsqueeze(1), largest / 256)).all()
    assert codes.abs().amax(1)[scale > 1e-9].min() >= 126
    assert not codes[5].any() and torch.isfinite(scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("M", [1, narrow.FEW - 1, narrow.FEW])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lacks", [False, True])
def test_it_is_the_product(
    dtype: torch.dtype,
    N: int,
    K: int,
    M: int,
    with_bias: bool,
    lacks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(narrow, "lacks_products", lambda _: lacks)
    codes, scale = quantize(table(N, K, dtype))
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = linear(x, codes, scale, bias if with_bias else None)
    wanted = x.double() @ values(codes, scale).T + (bias.double() if with_bias else 0)
    assert y.dtype == dtype and y.shape == (M, N)
    size = x.double().norm(dim=1, keepdim=True) * values(codes, scale).norm(dim=1) / K**0.5
    error = (y.double() - wanted) / (size + bias.double().abs() if with_bias else size)
    assert error.square().mean().sqrt() < TOLERANCE[dtype]


def test_large_sums_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "lacks_products", lambda _: False)
    codes, scale = quantize(torch.full((64, 4096), 1e-3, dtype=torch.float16))
    y = linear(torch.ones(narrow.FEW, 4096, dtype=torch.float16), codes, scale)
    torch.testing.assert_close(y, torch.full_like(y, 4.096), rtol=2e-3, atol=0)


def test_tokens_may_come_in_batches() -> None:
    codes, scale = quantize(table(64, 32, torch.float32))
    x = torch.randn(2, 3, 32)
    assert torch.equal(linear(x, codes, scale), linear(x.view(6, 32), codes, scale).view(2, 3, 64))


def made(dtype: torch.dtype) -> tuple[Int8EmbeddingMethod, torch.nn.Module, torch.Tensor]:
    """A table before its weights are processed, and these."""
    method, layer = Int8EmbeddingMethod("embed_tokens"), torch.nn.Module()
    method.create_weights(layer, 64, [128], 64, 128, params_dtype=dtype)
    weight = table(128, 64, dtype)
    layer.get_parameter("weight").data.copy_(weight)
    return method, layer, weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_and_the_head_that_is_tied_to_it(dtype: torch.dtype) -> None:
    method, layer, weight = made(dtype)
    head_method, head = Int8EmbeddingMethod("lm_head"), torch.nn.Module()
    head.weight = layer.weight
    for one, of in ((method, layer), (head_method, head)):
        one.process_weights_after_loading(of)
    codes, scale = quantize(weight)
    ids = torch.tensor([[3, 0, 127], [5, 5, 9]])
    found = method.embedding(layer, ids)
    assert found.dtype == dtype and found.shape == (2, 3, 64)
    torch.testing.assert_close(found, values(codes, scale)[ids].to(dtype), rtol=8e-3, atol=0)
    x = torch.randn(4, 64).to(dtype)
    assert torch.equal(head_method.apply(head, x), linear(x, codes, scale))
    assert set(layer.state_dict()) == {"weight", "weight_scale"}


def test_a_head_that_is_tied_to_a_dense_table_stays_dense(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_embedding.logger, "propagate", True)
    method, head, _ = made(torch.float32)
    weight = torch.randn(128, 64)
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    monkeypatch.setattr(LeanEmbeddingMethod, "apply", lambda *_: "dense")
    method.process_weights_after_loading(head)
    assert "embed_tokens stays as it is" in caplog.text
    assert method.apply(head, torch.zeros(1, 64)) == "dense"
    assert torch.equal(head.weight, weight)


def test_it_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMBEDDINGS_ENV, raising=False)
    assert not int8_wanted()
    monkeypatch.setenv(EMBEDDINGS_ENV, "")
    assert not int8_wanted()
    monkeypatch.setenv(EMBEDDINGS_ENV, "int8")
    assert int8_wanted()
    monkeypatch.setenv(EMBEDDINGS_ENV, "int4")
    with pytest.raises(ValueError, match=f"{EMBEDDINGS_ENV}=int4: unknown; it takes int8"):
        int8_wanted()


def test_other_devices_and_saved_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMBEDDINGS_ENV, "int8")
    config: Any = SimpleNamespace(load_config=SimpleNamespace(load_format="sharded_state"))
    monkeypatch.setattr(int8_embedding, "get_current_vllm_config_or_none", lambda: config)
    with pytest.raises(ValueError, match="--load-format sharded_state"):
        int8_wanted()
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False, raising=False)
    with pytest.raises(ValueError, match="for CPUs only"):
        int8_wanted()
