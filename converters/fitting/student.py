"""A BinaryMoS layer that can be trained, and the student model made of such layers.

    G[M,E] = softmax(x[M,K] @ R[E,K].T)
    y[M,N] = ((x * (G @ S_in[E,K])) @ sign(W)[N,K].T) * (G @ S_out[E,N]) + bias[N]

W[N,K] are latent weights. Only their signs are used; the gradient passes the sign unchanged
(straight-through, as in BinaryMoS, arXiv 2406.12311). Scales and routers are trained as factors of
what training starts from, so that one learning rate suits layers of any size.

A latent weight starts at +1 or -1, or where margins.py puts it: not at the dense weight. A fitted
sign is no more certain where the dense weight was large (error feedback chose it with all
others); a margin of |W| would flip at once, by noise, all signs whose weights were small.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT
from vllm_bmos.checkpoint.signs import pack_signs, unpack_signs

Tensors = dict[str, torch.Tensor]


def _sign(W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-1 or +1; latents are never exactly -0.0, which would be packed as +1."""
    one = torch.ones((), dtype=dtype, device=W.device)
    return torch.where(W >= 0, one, -one)


class _FoldedWeight(torch.autograd.Function):
    """diag(a[N]) sign(W)[N,K] diag(b[K]) in a given dtype, with a straight-through gradient for W.

    The gradients of W, a and b are made of the product's once per pass, so a layer with one expert
    costs what a dense one does, however many tokens there are.
    """

    @staticmethod
    def forward(
        ctx: Any, W: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        B = _sign(W, dtype)
        ctx.save_for_backward(B, a, b)
        return B * a.to(dtype)[:, None] * b.to(dtype)

    @staticmethod
    def backward(
        ctx: Any, dW_hat: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        B, a, b = ctx.saved_tensors
        signed = B * dW_hat  # exact: only signs change
        da = (signed @ b.to(signed.dtype)).to(a.dtype)
        db = (a.to(signed.dtype) @ signed).to(b.dtype)
        return dW_hat.to(a.dtype).mul_(a[:, None]).mul_(b), da, db, None


class _SignProduct(torch.autograd.Function):
    """x[M,K] @ sign(W)[N,K].T in x's dtype, with a straight-through gradient for W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        B = _sign(W, x.dtype)
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
        shape: (N, K).
        bias: of the dense layer, or None; it is not trained.
    """

    start_in: torch.Tensor
    start_out: torch.Tensor
    start_router: torch.Tensor
    router_unit: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, tensors: Tensors, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        super().__init__()
        N, K = shape
        self.latent = nn.Parameter(unpack_signs(tensors[WEIGHT], K).float())
        # Copies: `merge_experts` writes into them.
        S_in, S_out = (tensors[n].to(torch.float32, copy=True) for n in (IN_SCALE, OUT_SCALE))
        self.E = len(S_in)
        self.register_buffer("start_in", S_in)
        self.register_buffer("start_out", S_out)
        self.register_buffer("start_router", tensors[ROUTER].float())
        self.register_buffer("router_unit", torch.ones(()))  # see `set_router_units`
        self.register_buffer("bias", bias)
        self.factor_in = nn.Parameter(torch.ones(self.E, K))
        self.factor_out = nn.Parameter(torch.ones(self.E, N))
        self.router = nn.Parameter(torch.zeros(self.E, K))
        self.in_features, self.out_features = K, N

    @property
    def S_in(self) -> torch.Tensor:
        """[E, K]."""
        return self.start_in * whole(self.factor_in)

    @property
    def S_out(self) -> torch.Tensor:
        """[E, N]."""
        return self.start_out * whole(self.factor_out)

    @property
    def R(self) -> torch.Tensor:
        """[E, K]."""
        return self.start_router + self.router_unit * whole(self.router)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on x[..., K], in x's dtype."""
        if self.E == 1:
            folded = _FoldedWeight.apply(self.latent, self.S_out[0], self.S_in[0], x.dtype)
            y: torch.Tensor = x @ folded.T
        else:
            G = self.gates(x).to(x.dtype)
            y = _SignProduct.apply(
                (x * (G @ self.S_in.to(x.dtype))).flatten(0, -2), self.latent
            ).view(*x.shape[:-1], -1)
            y = y * (G @ self.S_out.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """G [..., E] in float32, of x[..., K]."""
        return (x.float() @ self.R.T).softmax(dim=-1)

    @torch.no_grad()
    def merge_experts(self) -> None:
        """Give every expert the mean scales."""
        self.start_in.copy_(self.S_in.mean(dim=0, keepdim=True).expand_as(self.start_in))
        self.start_out.copy_(self.S_out.mean(dim=0, keepdim=True).expand_as(self.start_out))
        self.factor_in.fill_(1)
        self.factor_out.fill_(1)

    @torch.no_grad()
    def pack(self, dtype: torch.dtype) -> Tensors:
        """The layer's tensors by their names in the format."""
        return {
            WEIGHT: pack_signs(whole(self.latent) >= 0),
            IN_SCALE: self.S_in.to(dtype),
            OUT_SCALE: self.S_out.to(dtype),
            ROUTER: self.R.to(dtype),
        }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of which FSDP may have left a part to each process."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def trainable_layers(model: nn.Module) -> dict[str, TrainableLinear]:
    """The trainable layers of a model or block, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TrainableLinear)}


def make_student(model: nn.Module, packed: dict[str, Tensors]) -> None:
    """Replace a dense model's (or block's) layers by trainable ones, in place; the rest is frozen.

    Args:
        model: a dense model or block.
        packed: the layers' tensors by module name in the model.
    """
    model.requires_grad_(False)
    for name, tensors in packed.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        bias = None if linear.bias is None else linear.bias.detach()
        shape = (linear.out_features, linear.in_features)
        model.set_submodule(name, TrainableLinear(tensors, shape, bias))


@torch.no_grad()
def set_router_units(model: nn.Module, tokens: torch.Tensor) -> None:
    """Measure the size of each layer's inputs on tokens [windows, T]; routers scale by it.

    One learning rate then suits every router, and the scales as well: if each of its K elements
    moves by lr as noise, the logit of a usual input moves by about lr, and by up to sqrt(K) lr if
    they all agree. Without the sqrt(K), noise alone would move logits by 1 within 100 steps of
    lr = 0.005 at K = 576, as much as they differ by at the start.
    """

    def watch(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # A median over tokens: a few tokens are a thousand times as large as the rest.
        size = inputs[0].float().norm(dim=-1).median()
        layer.get_buffer("router_unit").copy_(1 / size.clamp_min(1e-6))

    handles = [layer.register_forward_pre_hook(watch) for layer in trainable_layers(model).values()]
    model(tokens)
    for handle in handles:
        handle.remove()
