import pytest
import torch

from converters.fitting import svid
from converters.fitting.margins import latent_rate, set_margins
from converters.fitting.student import TrainableLinear

N, K = 24, 40


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return [TrainableLinear(svid.fit(torch.randn(N, K), 1), (N, K), None) for _ in range(2)]


def losses(layers, inputs, weight=1.0):
    return (weight * sum(layer(x).square().sum() for layer in layers) for x in inputs)


def test_costly_signs_are_farther_from_a_flip(layers):
    inputs = torch.randn(4, 64, K)
    inputs[..., 3] *= 100
    signs = [layer.latent >= 0 for layer in layers]
    set_margins(layers, losses(layers, inputs))
    for layer, sign in zip(layers, signs, strict=True):
        assert torch.equal(layer.latent >= 0, sign)
        margins = layer.latent.detach().abs()
        assert margins.min() >= 1
        assert margins[:, 3].min() > 2 * margins[:, 4:].max()


def test_margins_are_what_the_docstring_says(layers):
    inputs = torch.randn(3, 64, K)
    gradients = [
        torch.autograd.grad(loss, [layer.latent for layer in layers])
        for loss in losses(layers, inputs)
    ]
    r = torch.stack(
        [torch.stack([g[i] for g in gradients]).square().mean(0).sqrt() for i in (0, 1)]
    )
    set_margins(layers, losses(layers, inputs))
    found = torch.stack([layer.latent.detach().abs() for layer in layers])
    torch.testing.assert_close(found, 1 + r / r.mean())


def test_the_size_of_the_loss_does_not_matter(layers):
    inputs = torch.randn(2, 16, K)
    set_margins(layers, losses(layers, inputs))
    once = [layer.latent.detach().clone() for layer in layers]
    set_margins(layers, losses(layers, inputs, 1e-3))
    for layer, latent in zip(layers, once, strict=True):
        torch.testing.assert_close(layer.latent.detach(), latent)


def test_a_student_without_gradients_keeps_equal_margins(layers):
    set_margins(layers, losses(layers, torch.zeros(1, 4, K)))
    assert all(torch.equal(layer.latent.abs(), torch.ones(N, K)) for layer in layers)


def test_the_rate_falls_with_the_number_of_steps():
    rates = [latent_rate(steps) for steps in (1, 60, 144, 1500, 3000)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.031, 0.0219], rel=0.01)
