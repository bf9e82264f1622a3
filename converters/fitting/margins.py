"""How far each latent sign starts from its flip, and how far a step moves it.

A flip moves a latent by 2, so one that noise asked for costs twice the loss's curvature there,
which goes about as the mean square of the latent's gradient (Fisher). In SmolLM2-135M that spans
more than ten orders of magnitude: some layers matter more than others, and so do columns of
massive activations. Adam divides each gradient by its own size, so with equal margins costly
signs flip by noise as often as cheap ones, and most of what noise costs is theirs. Nor does a
flip pay unless the mean gradient exceeds the curvature; counted in steps of Adam, that distance
grows in proportion to the gradient's size. So does the margin here, from 1 up, as signs that cost
nothing should not flip for nothing.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from converters.fitting.student import TrainableLinear

MARGIN_WINDOWS = 32  # of text, on which gradients are measured


def set_margins(layers: Sequence[TrainableLinear], losses: Iterable[torch.Tensor]) -> None:
    """Move each latent to 1 + r / mean(r) from zero, r the root mean square of its gradients.

    Memory: one gradient at a time beside the model, and a copy of the latents' size on the CPU.

    Args:
        layers: whose latents are set; the mean is over all of them.
        losses: one for each piece of text, made one after another.
    """
    latents = [layer.latent for layer in layers]
    squares = [torch.zeros_like(latent, device="cpu") for latent in latents]

    def add_and_forget(square: torch.Tensor, latent: torch.Tensor) -> None:
        assert latent.grad is not None
        gradient = latent.grad.to(square.device)
        latent.grad = None
        square.addcmul_(gradient, gradient)

    hooks = [
        latent.register_post_accumulate_grad_hook(partial(add_and_forget, square))
        for latent, square in zip(latents, squares, strict=True)
    ]
    for loss in losses:
        torch.autograd.backward(loss, inputs=latents)
    for hook in hooks:
        hook.remove()
    sizes = [square.sqrt_() for square in squares]
    mean = sum(float(size.sum()) for size in sizes) / sum(size.numel() for size in sizes)
    with torch.no_grad():
        for latent, size in zip(latents, sizes, strict=True):
            margin = (1 + size / mean if mean > 0 else torch.ones_like(size)).to(latent.device)
            latent.copy_(torch.where(latent >= 0, margin, -margin))


def latent_rate(steps: int) -> float:
    """The learning rate of latent signs that suits a run of so many steps.

    Noise moves a latent by about rate * sqrt(steps), which should come near the margin of a typical
    sign: much farther, and signs flip at random; much less, and none flips (docs/FITTING.md).
    """
    return min(0.1, 1.2 / steps**0.5)
