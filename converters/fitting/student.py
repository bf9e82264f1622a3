"""A BinaryMoS layer that can be trained, and the student model made of such layers.

    G[M,E] = softmax(x[M,K] @ R[E,K].T)
    y[M,N] = ((x * (G @ S_in[E,K])) @ sign(W)[N,K].T) * (G @ S_out[E,N]) + bias[N]

W[N,K] are latent weights. Only their signs are used; the gradient passes the sign unchanged
(straight-through, as in BinaryMoS, arXiv 2406.12311). All parameters are relative to what training
starts from, so that one learning rate suits layers of any size: W is divided by its RMS, the
scales and the router are products of a fixed start and a trained factor.
"""

from typing import Any

import torch
from torch import nn

from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT
from vllm_bmos.checkpoint.signs import pack_signs, unpack_signs

Tensors = dict[str, torch.Tensor]


class _SignProduct(torch.autograd.Function):
    """x[M,K] @ sign(W)[N,K].T in x's dtype, with a straight-through gradient for W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        B = torch.where(W >= 0, 1.0, -1.0).to(x.dtype)
        ctx.save_for_backward(x, B)
        ctx.latent_dtype = W.dtype
        return x @ B.T

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, B = ctx.saved_tensors
        dW = (dy.T @ x).to(ctx.latent_dtype) if ctx.needs_input_grad[1] else None
        return dy @ B, dW


class TrainableLinear(nn.Module):
    """One layer.

    Args:
        tensors: the packed layer to start from, by the names in the format.
        magnitude: |W| [N, K] of the dense weight: how sure each sign is.
        bias: of the dense layer, or None; it is not trained.
        spread: relative standard deviation by which equal experts are set apart.
        generator: of that.
    """

    def __init__(
        self,
        tensors: Tensors,
        magnitude: torch.Tensor,
        bias: torch.Tensor | None,
        spread: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        N, K = magnitude.shape
        signs = unpack_signs(tensors[WEIGHT], K)
        rms = magnitude.square().mean().sqrt()
        self.latent = nn.Parameter(signs * (magnitude / rms).clamp_min(1e-3))
        S_in, S_out = tensors[IN_SCALE].float(), tensors[OUT_SCALE].float()
        self.E = len(S_in)
        self.register_buffer("start_in", S_in)
        self.register_buffer("start_out", S_out)
        self.register_buffer("start_router", tensors[ROUTER].float())
        self.register_buffer(
            "router_unit", torch.ones(())
        )  # a logit of 1 for an input of usual size
        equal = torch.equal(S_in, S_in[:1].expand_as(S_in)) and self.E > 1
        noise = spread if equal else 0.0

        def factor(size: int) -> nn.Parameter:
            return nn.Parameter(1 + noise * torch.randn(self.E, size, generator=generator))

        self.factor_in, self.factor_out = factor(K), factor(N)
        start = torch.randn(self.E, K, generator=generator) / K**0.5 if equal else None
        self.router = nn.Parameter(torch.zeros(self.E, K) if start is None else start)
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = K, N

    @property
    def S_in(self) -> torch.Tensor:
        """[E, K]."""
        return self.start_in * self.factor_in  # type: ignore[operator]

    @property
    def S_out(self) -> torch.Tensor:
        """[E, N]."""
        return self.start_out * self.factor_out  # type: ignore[operator]

    @property
    def R(self) -> torch.Tensor:
        """[E, K]."""
        return self.start_router + self.router_unit * self.router  # type: ignore[operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on x[..., K], in x's dtype."""
        shape, dtype = x.shape[:-1], x.dtype
        x = x.reshape(-1, self.in_features)
        if self.E == 1:
            y = _SignProduct.apply(x * self.S_in[0].to(dtype), self.latent)
            y = y * self.S_out[0].to(dtype)
        else:
            G = (x.float() @ self.R.T).softmax(dim=-1).to(dtype)
            y = _SignProduct.apply(x * (G @ self.S_in.to(dtype)), self.latent)
            y = y * (G @ self.S_out.to(dtype))
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.view(*shape, self.out_features)

    @torch.no_grad()
    def pack(self, dtype: torch.dtype) -> Tensors:
        """The layer's tensors by their names in the format."""
        return {
            WEIGHT: pack_signs(self.latent >= 0),
            IN_SCALE: self.S_in.to(dtype),
            OUT_SCALE: self.S_out.to(dtype),
            ROUTER: self.R.to(dtype),
        }


def make_student(
    model: Any, packed: dict[str, Tensors], names: dict[str, str], spread: float, seed: int
) -> None:
    """Replace a dense model's layers by trainable ones, in place; all else is frozen.

    Args:
        model: a dense transformers model.
        packed: the layers' tensors by module name on disk.
        names: name on disk -> module name in the model.
        spread: see `TrainableLinear`.
        seed: of the noise that sets experts apart.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for disk, tensors in packed.items():
        linear = model.get_submodule(names[disk])
        bias = None if linear.bias is None else linear.bias.detach()
        magnitude = linear.weight.detach().float().abs()
        layer = TrainableLinear(tensors, magnitude, bias, spread, generator)
        model.set_submodule(names[disk], layer)


@torch.no_grad()
def set_router_units(model: nn.Module, tokens: torch.Tensor) -> None:
    """Measure the size of each layer's inputs on tokens [windows, T]; routers scale by it."""
    layers = [module for module in model.modules() if isinstance(module, TrainableLinear)]

    def watch(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # A median over tokens: a few tokens are a thousand times as large as the rest.
        size = inputs[0].float().square().mean(dim=-1).sqrt().median()
        layer.get_buffer("router_unit").copy_(1 / size.clamp_min(1e-6))

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    model(tokens)
    for handle in handles:
        handle.remove()
