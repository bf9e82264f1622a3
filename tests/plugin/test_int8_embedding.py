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
    quantize,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


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
    before = weight.clone()
    codes, scale = quantize(weight)
    assert torch.equal(weight, before)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scale.dtype == torch.float32 and scale.shape == (len(weight),)
    off = (values(codes, scale) - weight.double()).abs()
    assert (off <= 0.50001 * scale.double().unsqueeze(1)).all()
    assert (codes.abs().amax(1) == 127).sum() == len(weight) - 1
    assert not codes[5].any() and torch.isfinite(scale).all()


def test_scales_do_not_depend_on_torchs_default_dtype() -> None:
    weight = table(8, 100, torch.float16) * 1e-3  # vLLM loads a float16 model with that default
    expected = quantize(weight)
    torch.set_default_dtype(torch.float16)
    try:
        found = quantize(weight)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert (found[0].abs().amax(1) == 127).all()


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
    assert torch.equal(found, (codes * scale.unsqueeze(1))[ids].to(dtype))
    x = torch.randn(4, 64).to(dtype)
    assert torch.equal(head_method.apply(head, x), narrow.linear(x, codes, None, scale))
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


def test_a_checkpoint_is_not_copied_into_integers() -> None:
    copied = []
    method, layer = Int8EmbeddingMethod("lm_head"), torch.nn.Module()
    loader = {"weight_loader": lambda param, loaded_weight: copied.append(loaded_weight)}
    method.create_weights(layer, 64, [128], 64, 128, params_dtype=torch.float32, **loader)
    weight = layer.get_parameter("weight")
    weight.data.normal_()
    weight.weight_loader(weight, "first")  # type: ignore[attr-defined]
    method.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match=r"lm_head: its weights are in 8 bits.*reload_weights"):
        weight.weight_loader(weight, "second")  # type: ignore[attr-defined]
    assert copied == ["first"]


def vllm_config(load_format: str = "auto", **model: Any) -> SimpleNamespace:
    usual = {
        "runner_type": "generate",
        "dtype": torch.bfloat16,
        "head_dtype": torch.bfloat16,
        "architectures": ["LlamaForCausalLM"],
    }
    load = SimpleNamespace(load_format=load_format)
    return SimpleNamespace(load_config=load, model_config=SimpleNamespace(**(usual | model)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (vllm_config(), None),
        (vllm_config(runner_type="pooling", head_dtype=torch.float32), None),
        (vllm_config("sharded_state"), "--load-format sharded_state"),
        (vllm_config(head_dtype=torch.float32), r"head_dtype torch\.float32.*Unset one of the two"),
        (
            vllm_config(architectures=["EmbeddingGemma2Model"]),
            "vLLM's EmbeddingGemma2Model looks at",
        ),
    ],
)
def test_what_cannot_have_it_is_refused(
    config: SimpleNamespace, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EMBEDDINGS_ENV, "int8")
    monkeypatch.setattr(int8_embedding, "get_current_vllm_config_or_none", lambda: config)
    if message is None:
        assert int8_wanted()
        return
    with pytest.raises(ValueError, match=message):
        int8_wanted()


def test_it_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMBEDDINGS_ENV, "int8")
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False, raising=False)
    with pytest.raises(ValueError, match="for CPUs only"):
        int8_wanted()
