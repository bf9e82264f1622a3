"""One layer between dense weights and the packed format."""

from typing import NamedTuple

import torch

from converters.fitting import descent, feedback, least_squares
from converters.fitting.svid import rank_one
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT
from vllm_bmos.checkpoint.signs import pack_signs, unpack_signs

ROUNDS = 3  # alternations of least squares and descent
SWEEPS = 2  # of descent in one round

Tensors = dict[str, torch.Tensor]


class Fitted(NamedTuple):
    """W_hat = diag(a) B diag(b): signs B [N, K] of -1 and +1, scales a [N] and b [K]."""

    B: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


def fit_static(
    W: torch.Tensor, H: torch.Tensor, rounds: int = ROUNDS, sweeps: int = SWEEPS
) -> Fitted:
    """W ~ diag(a) B diag(b) under H: initialise, round with feedback, then improve in turns.

    The rank-one start sees columns in proportion to the size of their inputs, as in RaBiT and
    NanoQuant (arXiv 2602.06694): |W| diag(H)^1/2 ~ a (b diag(H)^1/2)^T.

    Args:
        W: target [N, K].
        H: damped second moment of the inputs [K, K].
        rounds: alternations of scales and signs.
        sweeps: of coordinate descent in a round.
    """
    size = H.diagonal().sqrt()
    a, b = rank_one(W.abs() * size)
    b = b / size
    B = feedback.signs(W, a, b, H)
    a, b = least_squares.solve(W, B, b, H)
    for _ in range(rounds):
        flips = sum(descent.sweep(W, B, a, b, H) for _ in range(sweeps))
        a, b = least_squares.solve(W, B, b, H, rounds=1)
        if flips == 0:
            break
    return Fitted(B, a, b)


def relative_error(W: torch.Tensor, layer: Fitted, H: torch.Tensor) -> float:
    """tr(R H R^T) / tr(W H W^T)."""
    return float(least_squares.loss(W, *layer, H) / ((W @ H) * W).sum())


def pack(layer: Fitted, E: int, dtype: torch.dtype) -> Tensors:
    """A layer's tensors by their names in the format: E equal experts and a router of zeros."""
    B, a, b = layer
    balance = (a.norm() / b.norm()).sqrt()  # float16 has little room: give both the same size
    return {
        WEIGHT: pack_signs(B > 0),
        IN_SCALE: (b * balance).to(dtype).repeat(E, 1),
        OUT_SCALE: (a / balance).to(dtype).repeat(E, 1),
        ROUTER: torch.zeros(E, len(b), dtype=dtype),
    }


def dense_weight(tensors: Tensors) -> torch.Tensor:
    """W_hat [N, K], in float32, of a layer whose experts are equal."""
    a, b = tensors[OUT_SCALE][0].float(), tensors[IN_SCALE][0].float()
    return a[:, None] * unpack_signs(tensors[WEIGHT], len(b)) * b


def layer_of(tensors: Tensors, module: str) -> Tensors:
    """One layer's tensors by their names in the format."""
    prefix = f"{module}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
