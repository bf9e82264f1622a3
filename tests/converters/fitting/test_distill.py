from dataclasses import replace

import pytest
import torch

from converters.fitting import distill, svid
from converters.fitting.distill import DistillOptions, count_flips, divergence
from converters.fitting.student import TrainableLinear, set_router_units
from converters.options import Options
from converters.sources import open_source
from tests.converters.models import make_dense
from tests.tiny import VOCAB
from vllm_bmos import ops
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT

OPTIONS = DistillOptions(tokens=16 * 32, batch=2, save_steps=3, latent_lr=1e-2, scale_lr=3e-3)


def reference(x, tensors, bias=None):
    return ops.linear(
        x,
        None,
        tensors[WEIGHT],
        tensors[IN_SCALE].unsqueeze(0),
        tensors[OUT_SCALE],
        tensors[ROUTER].unsqueeze(0),
        bias,
        [tensors[OUT_SCALE].shape[1]],
        "reference",
    )


def layer(E, N=24, K=33, spread=0.0, bias=None):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N, K, generator=generator)
    tensors = svid.fit(W, E)
    return tensors, TrainableLinear(tensors, W.abs(), bias, spread, generator)


@pytest.mark.parametrize("E", [1, 4])
def test_training_starts_from_the_packed_layer(E):
    bias = torch.randn(24)
    tensors, trainable = layer(E, bias=bias)
    x = torch.randn(2, 5, 33)
    found = trainable(x)
    expected = reference(x.view(10, 33), tensors, bias).view(2, 5, 24)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("E", [1, 3])
def test_what_is_packed_is_what_was_trained(E):
    _, trainable = layer(E, spread=0.5)
    with torch.no_grad():
        trainable.latent[0, 0] = 0.0
        trainable.latent[3] *= -1
        trainable.router += torch.randn_like(trainable.router)
        trainable.router_unit.fill_(0.3)
    x = torch.randn(10, 33)
    packed = trainable.pack(torch.float32)
    torch.testing.assert_close(trainable(x), reference(x, packed), rtol=1e-4, atol=1e-4)
    if E > 1:
        assert not torch.equal(packed[IN_SCALE][0], packed[IN_SCALE][1])


def test_gradients_are_those_of_a_dense_layer_at_the_signs():
    _, trainable = layer(4, spread=0.3)
    x, dy = torch.randn(10, 33), torch.randn(10, 24)
    trainable(x).backward(dy)
    B = torch.where(trainable.latent >= 0, 1.0, -1.0).detach().requires_grad_()
    G = (x @ trainable.R.T).softmax(-1)
    y = ((x * (G @ trainable.S_in)) @ B.T) * (G @ trainable.S_out)
    expected = torch.autograd.grad(y, [B, trainable.factor_in, trainable.router], dy)
    found = [trainable.latent.grad, trainable.factor_in.grad, trainable.router.grad]
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-4)


def test_equal_experts_are_set_apart_and_different_ones_are_kept():
    tensors, trainable = layer(4, spread=0.1)
    scales = trainable.S_in.detach()
    assert all(not torch.equal(scales[0], scales[e]) for e in range(1, 4))
    other = {**tensors, IN_SCALE: scales}
    again = TrainableLinear(other, torch.ones(24, 33), None, 0.1, torch.Generator())
    assert torch.equal(again.S_in, scales) and torch.equal(again.R, tensors[ROUTER])


def test_routers_scale_by_the_usual_size_of_their_inputs():
    _, trainable = layer(4)
    x = 5 * torch.randn(64, 33)
    x[0] *= 1e4
    set_router_units(torch.nn.Sequential(trainable), x)
    assert float(trainable.router_unit) == pytest.approx(0.2, rel=0.2)


def test_divergence_is_kl_with_its_gradient():
    torch.manual_seed(0)
    student = torch.randn(600, 50, dtype=torch.float32, requires_grad=True)
    teacher = 3 * torch.randn(600, 50)
    found = divergence(student, teacher)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 600
    torch.testing.assert_close(found, expected)
    (want,) = torch.autograd.grad(2 * expected, student)
    (got,) = torch.autograd.grad(2 * found, student)
    torch.testing.assert_close(got, want)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    path = tmp_path_factory.mktemp("distill")
    source = open_source(make_dense(path / "dense"), Options(experts=2, scale_dtype="float32"))
    start = {
        f"{module}.{suffix}": tensor
        for module in source.modules
        for suffix, tensor in source.layer(module).tensors.items()
    }
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    return path, source, start, tokens


def train(setting, name, options=OPTIONS, signs=True):
    path, source, start, tokens = setting
    (path / name).mkdir(exist_ok=True)
    # Random tokens have nothing in common, so what is learnt shows on the trained ones only.
    return distill.fit(source, start, tokens, tokens[:2], path / name, options, 0, signs)


def flips(one, other):
    modules = {name.rpartition(".")[0] for name in one}
    return sum(
        count_flips({WEIGHT: one[f"{m}.{WEIGHT}"]}, {WEIGHT: other[f"{m}.{WEIGHT}"]})
        for m in modules
    )


def test_training_lowers_the_loss_and_flips_signs_only_if_asked(setting, caplog):
    caplog.set_level("INFO")
    start = setting[2]
    trained = train(setting, "signs")
    assert "discarded" not in caplog.text
    assert trained.keys() == start.keys() and flips(trained, start) > 0
    scales = train(setting, "scales", signs=False)
    assert flips(scales, start) == 0
    assert any(not torch.equal(scales[name], start[name]) for name in start)


def test_an_interrupted_training_continues_with_the_same_bytes(setting, monkeypatch):
    whole = train(setting, "whole")
    assert flips(whole, setting[2]) > 0
    count, real = [0], distill.divergence

    def stop_late(*logits):
        count[0] += 1
        if count[0] == 2 + 5:  # two windows are held out; then comes the fifth of eight steps
            raise KeyboardInterrupt
        return real(*logits)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "divergence", stop_late)
        train(setting, "stopped")
    assert (setting[0] / "stopped" / "checkpoint-3").is_dir()
    continued = train(setting, "stopped")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_result_that_does_not_help_is_discarded(setting, caplog):
    worse = replace(OPTIONS, latent_lr=30.0, scale_lr=30.0)
    assert train(setting, "worse", worse) is setting[2]
    assert "discarded" in caplog.text
