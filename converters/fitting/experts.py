"""Late splitting of experts: one trained expert becomes E, by clusters of tokens.

Experts that are set apart by noise from the start must find a division of labour and the signs at
the same time. Here the signs come first, with one expert (OneBit). Then, for each layer,

    1. its inputs x[M,K] on calibration text are clustered by direction (spherical k-means),
    2. the router R[E,K] is fitted to the clusters: multinomial regression of softmax(x R^T),
    3. every expert starts with the same scales, so the split changes nothing yet.

Training goes on from there with all parameters; an expert's gradient is that of its tokens. At the
end a block's experts are merged again where that does not raise the loss on held-out text.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from converters.evaluate import gate_entropy
from converters.fitting.student import TrainableLinear, trainable_layers
from converters.structure import IN_BLOCK
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER

logger = logging.getLogger(__name__)

TOKENS = 16384  # of calibration text that are clustered; routers fitted to 4096 do not generalise
ROUNDS = 20  # of k-means
STEPS = 25  # of the regression
RIDGE = 3e-2  # of the regression, for inputs of usual size 1; less makes nearly hard gates

Tensors = dict[str, torch.Tensor]


def with_experts(tensors: Tensors, modules: Iterable[str], E: int) -> Tensors:
    """Layers by full name with E experts each, if theirs are equal; as they are if not.

    Equal experts are one expert, whatever the router says: its weights sum to 1.
    """
    result = dict(tensors)
    for module in modules:
        names = [f"{module}.{suffix}" for suffix in (IN_SCALE, OUT_SCALE, ROUTER)]
        parts = [tensors[name] for name in names]
        if len(parts[0]) != E and all(torch.equal(s, s[:1].expand_as(s)) for s in parts[:2]):
            router = torch.zeros_like(parts[2][:1])
            parts = [part[:1].repeat(E, 1) for part in (*parts[:2], router)]
        result |= dict(zip(names, parts, strict=True))
    return result


def cluster(x: torch.Tensor, E: int, generator: torch.Generator) -> torch.Tensor:
    """Spherical k-means: the cluster [M], from 0 to E-1, of each row of x [M, K].

    Channels are divided by their RMS first, as a few of them are far larger than the rest.
    """
    x = x / x.square().mean(dim=0).sqrt().clamp_min(1e-12)
    x = nn.functional.normalize(x, dim=1)
    centres = x[torch.randperm(len(x), generator=generator)[:E].to(x.device)]
    for _ in range(ROUNDS):
        nearest = (x @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = nn.functional.normalize(sums, dim=1)  # an empty cluster stays empty
    return nearest


def fit_router(x: torch.Tensor, clusters: torch.Tensor, E: int) -> torch.Tensor:
    """R [E, K] whose softmax(x R^T) predicts the clusters [M] of x [M, K]."""
    unit = x.square().mean(dim=1).sqrt().median().clamp_min(1e-6)
    x = x / unit
    R = torch.zeros(E, x.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([R], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(x @ R.T, clusters) + RIDGE * R.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return R.detach() / unit


def split(student: Any, tokens: torch.Tensor, E: int, seed: int) -> dict[str, Tensors]:
    """Split every layer of a student with one expert.

    Args:
        student: with trainable layers.
        tokens: calibration windows [windows, T]; about `TOKENS` tokens are used.
        E: experts of the result.
        seed: of the clusters' start.

    Returns:
        The packed layers' tensors in float32, by module name in the student.
    """
    result: dict[str, Tensors] = {}
    last: list[Any] = [None, None]  # an input and its router: q, k and v share theirs
    entropy: list[float] = []

    def look(name: str, layer: TrainableLinear, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0] is not last[0]:
            x = inputs[0].flatten(0, -2).float()
            generator = torch.Generator().manual_seed(seed)
            with torch.enable_grad():
                R = fit_router(x, cluster(x, E, generator), E)
            G = (x @ R.T).softmax(dim=-1)
            entropy.append(gate_entropy(G))
            last[:] = inputs[0], R
        packed = layer.pack(torch.float32)
        for scale in (IN_SCALE, OUT_SCALE):
            packed[scale] = packed[scale][:1].repeat(E, 1)
        result[name] = {k: t.cpu() for k, t in {**packed, ROUTER: last[1].clone()}.items()}

    handles = [
        layer.register_forward_pre_hook(_bind(look, name))
        for name, layer in trainable_layers(student).items()
    ]
    with torch.no_grad():
        windows = tokens[: math.ceil(TOKENS / tokens.shape[1])]
        # Without the head: nobody reads logits, which would be tokens x vocabulary.
        student.get_decoder()(windows.to(next(student.parameters()).device), use_cache=False)
    for handle in handles:
        handle.remove()
    mean = sum(entropy) / len(entropy)
    logger.info("experts: routers' entropy %.2f bits of %.2f", mean, math.log2(E))
    return result


def _bind(look: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda layer, inputs: look(name, layer, inputs)


@torch.no_grad()
def merge_where_useless(student: Any, loss: Callable[[], float]) -> int:
    """Give the experts of a block their mean scales again unless that raises the held-out loss.

    Args:
        student: with trainable layers, changed in place.
        loss: of the student on held-out text.

    Returns:
        How many blocks keep different experts.
    """
    blocks: dict[str, list[TrainableLinear]] = {}
    for name, layer in trainable_layers(student).items():
        match = IN_BLOCK.search(name)
        blocks.setdefault(name[: match.end()] if match else name, []).append(layer)
    best, kept = loss(), 0
    for layers in blocks.values():
        tensors = [
            t
            for layer in layers
            for t in (layer.start_in, layer.factor_in, layer.start_out, layer.factor_out)
        ]
        before = [t.clone() for t in tensors]
        for layer in layers:
            layer.merge_experts()
        merged = loss()
        if merged <= best:
            best = merged
            continue
        kept += 1
        for t, value in zip(tensors, before, strict=True):
            t.copy_(value)
    logger.info("experts: %d of %d blocks keep theirs; held-out KL %.4f", kept, len(blocks), best)
    return kept
