"""Stage `hessian`: fit block by block under the second moment of each layer's inputs.

No gradients. For each decoder block, and within it for each group of layers that share an input:

    1. run the dense and the half-converted model up to the group on the calibration text,
    2. move the target so that it makes up for the error that the inputs bring  (propagation.py)
    3. choose the signs with error feedback                                     (feedback.py)
    4. in turns: scales by least squares                                        (least_squares.py)
       and signs by coordinate descent                                          (descent.py)

Memory: one block twice, the hidden states of both models, for each thread the sums over one batch
(2 K^2 + N K floats), and in the solvers a few K x K matrices of float64.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from converters.fitting.blocks import BlockModel, Kwargs, advance
from converters.fitting.folder import FitFolder
from converters.fitting.layer import (
    Fitted,
    dense_weight,
    fit_static,
    layer_of,
    pack,
    relative_error,
)
from converters.fitting.observe import Group, find_groups, look
from converters.fitting.precision import bfloat16_products
from converters.fitting.propagation import Moments, target
from converters.fitting.threads import workers

logger = logging.getLogger(__name__)

STAGE = "hessian"
Tensors = dict[str, torch.Tensor]
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class HessianOptions:
    """What can be chosen.

    Attributes:
        alpha: share of the inherited error that a layer makes up for, from 0 to 1.
        residual: whether layers that write the residual stream make up for its error too.
        damping: of H, relative to the mean of its diagonal.
        batch: windows in one forward pass.
    """

    alpha: float = 0.7
    residual: bool = True
    damping: float = 0.01
    batch: int = 4


@dataclass
class _Pass:
    """A block of both models while it is fitted.

    Attributes:
        teacher: the dense block.
        student: the block whose layers are replaced one by one.
        hidden: inputs of the dense and of the converted block, each [windows, T, hidden].
        kwargs: the rest of the blocks' call.
        writers: layers fitted so far that write the residual stream.
    """

    teacher: nn.Module
    student: nn.Module
    hidden: tuple[torch.Tensor, torch.Tensor]
    kwargs: Kwargs
    writers: list[str] = field(default_factory=list)


def fit(
    model: BlockModel,
    tokens: torch.Tensor,
    E: int,
    scale_dtype: torch.dtype,
    folder: FitFolder,
    options: HessianOptions | None = None,
    threads: int = 0,
) -> Tensors:
    """Fit every layer. The result does not depend on the number of threads.

    Args:
        model: the dense model.
        tokens: calibration windows [windows, T].
        E: experts of the result; they are equal.
        scale_dtype: of the result's scales.
        folder: where finished blocks are kept.
        options: see `HessianOptions`.
        threads: 0 takes one per core.

    Returns:
        The packed layers' tensors by their full names on disk.
    """
    options = options or HessianOptions()
    result: Tensors = {}
    began, fitted = time.monotonic(), 0
    with workers(threads) as pool, torch.inference_mode():
        dense, calls = model.first_inputs(tokens)
        hidden = dense.clone()
        for index, kwargs in enumerate(calls):
            teacher = model.load(index)
            here = _Pass(teacher, copy.deepcopy(teacher), (dense, hidden), kwargs)
            piece = f"block-{index:04d}"
            tensors = folder.read(STAGE, piece)
            if tensors is None:
                tensors = {}
                for name, layer in _fit_block(here, list(model.linears[index]), pool, options):
                    packed = pack(layer, E, scale_dtype)
                    disk = model.linears[index][name]
                    tensors |= {f"{disk}.{suffix}": t for suffix, t in packed.items()}
                    _replace(here.student, name, packed)
                folder.write(STAGE, piece, tensors)
                fitted += 1
            else:
                for name, disk in model.linears[index].items():
                    _replace(here.student, name, layer_of(tensors, disk))
            result |= tensors
            advance(here.teacher, dense, kwargs, pool, options.batch)
            advance(here.student, hidden, kwargs, pool, options.batch)
            left = (time.monotonic() - began) / (index + 1) * (len(calls) - index - 1)
            logger.info(
                "hessian: block %d of %d, hidden-state error %.3f, about %.0f s left",
                index + 1,
                len(calls),
                token_error(dense, hidden),
                left,
            )
    return result


def _fit_block(
    here: _Pass, names: list[str], pool: ThreadPoolExecutor, options: HessianOptions
) -> Iterator[tuple[str, Fitted]]:
    """Fit the layers of a block, in the order in which it runs them."""
    for group in find_groups(here.teacher, names, here.hidden[0][:1], here.kwargs):
        moments = _moments(here, group, pool, options)
        H = moments.damped(options.damping)

        def fit_one(name: str, moments: Moments = moments, H: torch.Tensor = H) -> Fitted:
            W = _linear(here.teacher, name).weight
            wanted = target(W, moments, options.alpha, options.damping)
            layer = fit_static(wanted, H)
            flips = float((layer.B != torch.where(W >= 0, 1.0, -1.0)).float().mean())
            error = relative_error(wanted, layer, H)
            logger.info("  %-20s error %.3f, flips %4.1f %%", name, error, 100 * flips)
            return layer

        yield from zip(group.names, pool.map(_quiet(fit_one), group.names), strict=True)
        if group.writes_residual:
            here.writers.append(group.names[0])


def _quiet(function: Callable[[Given], Made]) -> Callable[[Given], Made]:
    """Inference mode belongs to a thread, so work for a pool must bring its own."""
    made: Callable[[Given], Made] = torch.inference_mode()(function)
    return made


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _moments(
    here: _Pass, group: Group, pool: ThreadPoolExecutor, options: HessianOptions
) -> Moments:
    """Sums over all calibration tokens at one group."""
    layer = _linear(here.teacher, group.names[0])
    writes = group.writes_residual
    N = layer.out_features if writes and options.residual else None

    def one(parts: tuple[torch.Tensor, torch.Tensor]) -> Moments:
        X, r = look(here.teacher, group, here.writers, parts[0], here.kwargs)
        X_hat, r_hat = look(here.student, group, here.writers, parts[1], here.kwargs)
        moments = Moments.zeros(layer.in_features, N)
        moments.add(X, X_hat, r - r_hat, token_weights(r) if writes else None)
        return moments

    total = Moments.zeros(layer.in_features, N)
    parts = zip(*(hidden.split(options.batch) for hidden in here.hidden), strict=True)
    with bfloat16_products():
        for moments in pool.map(_quiet(one), parts):
            total += moments
    return total


def token_weights(stream: torch.Tensor) -> torch.Tensor:
    """Weights of tokens [tokens] by their residual stream [tokens, hidden].

    The next norm divides a token's stream by its size, so an error counts relative to that. A
    padding token's stream may be zero: none counts more than a hundred usual ones.
    """
    size = stream.square().mean(dim=1)
    return 1 / size.clamp_min(0.01 * size.median())


def _replace(student: nn.Module, name: str, packed: Tensors) -> None:
    _linear(student, name).weight = nn.Parameter(dense_weight(packed), requires_grad=False)


def token_error(dense: torch.Tensor, hidden: torch.Tensor) -> float:
    """Mean over tokens of |h - h_hat|^2 / |h|^2."""
    return float(((hidden - dense).square().sum(-1) / dense.square().sum(-1)).mean())
