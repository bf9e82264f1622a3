"""Causal attention for training: values, gradients, and which models may use it."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from converters.fitting import attention
from converters.fitting.attention import NAME, PLAIN, causal_attention, use_fast_attention
from tests.tiny import CONFIGS, VOCAB


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The formula."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    T = q.shape[2]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (q @ k.mT * scale).masked_fill(future, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("T", [1, 5, 16, 37])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(heads, T, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 16)
    torch.manual_seed(0)
    H, shared = heads
    x = [torch.randn(2, n, T, 8).to(dtype).requires_grad_() for n in (H, shared, shared)]
    d_out = torch.randn(2, H, T, 8).to(dtype)
    found = causal_attention(*x, 0.3)
    exact = [t.detach().double().requires_grad_() for t in x]
    wanted = plain(*exact, 0.3)
    pairs = [(found, wanted)]
    gradients = torch.autograd.grad(found, x, d_out)
    pairs += zip(gradients, torch.autograd.grad(wanted, exact, d_out.double()), strict=True)
    for got, want in pairs:
        scale = max(float(want.detach().norm()), 1.0)  # one token has no gradient for q and k
        assert float((got.double() - want).detach().norm()) <= tolerance * scale


@pytest.mark.parametrize("kind", ["llama", "llama-mqa", "mistral", "qwen3", "gemma", "opt"])
def test_models_train_by_it_as_by_plain_products(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).train(False)
    tokens = torch.randint(0, VOCAB, (2, 40))
    results = []
    for fast in (False, True):
        model.set_attn_implementation(PLAIN)
        if fast:
            use_fast_attention(model, tokens[:1])
        logits = model(tokens).logits
        model.zero_grad()
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, why", [("gemma2", "softcap"), ("mistral", "a mask")])
def test_what_it_cannot_do_is_left_to_plain_products(kind, why, caplog):
    config = CONFIGS[kind]()
    if kind == "mistral":
        config.sliding_window = 16
    model = AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.INFO):
        use_fast_attention(model, torch.randint(0, VOCAB, (1, 40)))
    assert why in caplog.text
    assert model.config._attn_implementation == PLAIN


def test_dropout_is_refused():
    config = CONFIGS["opt"]()
    config.attention_dropout = 0.1
    tokens = torch.randint(0, VOCAB, (1, 10))
    model = AutoModelForCausalLM.from_config(config).eval()
    use_fast_attention(model, tokens)
    assert model.config._attn_implementation == NAME
    with pytest.raises(NotImplementedError, match="dropout"):
        model.train()(tokens)
