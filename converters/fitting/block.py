"""Stage `block`: train one decoder block after another on the dense model's hidden states.

Block-wise reconstruction as in EfficientQAT (arXiv 2407.11062, Block-AP) and NanoQuant (arXiv
2602.06694), in BinaryMoS's form. The inputs of a block are the outputs of the binary blocks before
it; the target is what the dense block makes of the dense model's own inputs, so a block also learns
to undo what it inherits. A token's squared error counts in proportion to 1/|h|^2, as in `hessian`.
Latent signs, as far from their flips as these cost (margins.py), and scales are trained by Adam
with a straight-through gradient, in many small steps: a token's target is a whole hidden state, so
a few hundred tokens settle a flip. A block is kept only if its error on held-out text fell.

Memory: one block twice, its optimizer, and the hidden states of both models. It runs on one core.
"""

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from converters.fitting.blocks import BlockModel, Kwargs, run_block
from converters.fitting.folder import FitFolder
from converters.fitting.hessian import token_error, token_weights
from converters.fitting.layer import layer_of
from converters.fitting.margins import MARGIN_WINDOWS, latent_rate, set_margins
from converters.fitting.precision import bfloat16_products
from converters.fitting.student import make_student, trainable_layers
from converters.fitting.threads import one_thread_per_op

logger = logging.getLogger(__name__)

STAGE = "block"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BlockOptions:
    """What can be chosen.

    Attributes:
        epochs: passes over the calibration text for each block.
        length: tokens in a window of training, into which run.py cuts.
        batch: windows in one step.
        latent_lr: learning rate of latent signs, relative to the least distance from a flip; None
            for that of `latent_rate`.
        scale_lr: learning rate of scales, relative to their start.
    """

    epochs: int = 2
    length: int = 256
    batch: int = 1
    latent_lr: float | None = None
    scale_lr: float = 5e-3


@dataclass
class _Text:
    """Hidden states [windows, T, hidden] of one set of windows in front of a block.

    Attributes:
        dense: the dense model's.
        hidden: the binary model's.
        calls: what each block is called with, for windows of this length.
    """

    dense: torch.Tensor
    hidden: torch.Tensor
    calls: list[Kwargs]

    @classmethod
    def of(cls, model: BlockModel, tokens: torch.Tensor) -> "_Text":
        """In front of the first block, where both models have the same."""
        first, calls = model.first_inputs(tokens)
        return cls(first, first.clone(), calls)

    @torch.no_grad()
    def advance(self, index: int, teacher: nn.Module | None, student: nn.Module | None) -> None:
        """Replace either model's states by the outputs of its block `index`, in place."""
        for block, states in ((teacher, self.dense), (student, self.hidden)):
            if block is not None:
                for part in states.split(1):
                    part.copy_(run_block(block, part, self.calls[index]))


def fit(
    model: BlockModel,
    start: Tensors,
    train: torch.Tensor,
    held_out: torch.Tensor,
    scale_dtype: torch.dtype,
    folder: FitFolder,
    options: BlockOptions | None = None,
    seed: int = 0,
) -> Tensors:
    """Train every block. Bytes depend neither on the number of cores nor on an interruption.

    Args:
        model: the dense model.
        start: the packed layers' tensors by full name.
        train: calibration windows [windows, T].
        held_out: windows to check on, which may be longer.
        scale_dtype: of the result's scales.
        folder: where finished blocks are kept.
        options: see `BlockOptions`.
        seed: of the order of windows.

    Returns:
        The packed layers' tensors by their full names on disk.
    """
    options = options or BlockOptions()
    steps = options.epochs * math.ceil(len(train) / options.batch)
    if options.latent_lr is None:
        options = replace(options, latent_lr=latent_rate(steps))
    logger.info(
        "block: %d steps a block, each of %d windows of %d tokens",
        steps,
        options.batch,
        train.shape[1],
    )
    logger.info("learning rate of latent signs: %.3g", options.latent_lr)
    result: Tensors = {}
    began = time.monotonic()
    with one_thread_per_op(), bfloat16_products():
        texts = [_Text.of(model, tokens) for tokens in (train, held_out)]
        for index, linears in enumerate(model.linears):
            teacher = model.load(index)
            packed = {n: layer_of(start, disk) for n, disk in linears.items()}
            piece = f"block-{index:04d}"
            tensors = folder.read(STAGE, piece)
            for text in texts:
                text.advance(index, teacher, None)  # now it holds the target
            if tensors is None:
                student = _student(teacher, packed)
                # All layers of a block may stay dense.
                kept = bool(packed) and _train(student, texts, index, options, seed + index)
                if kept:
                    layers = trainable_layers(student)
                    packed = {name: layers[name].pack(scale_dtype) for name in packed}
                tensors = {
                    f"{linears[name]}.{suffix}": tensor
                    for name, layer in packed.items()
                    for suffix, tensor in layer.items()
                }
                folder.write(STAGE, piece, tensors)
            # From the packed tensors, so that a resumed fit goes on with the same bytes.
            packed = {n: layer_of(tensors, disk) for n, disk in linears.items()}
            student = _student(teacher, packed)
            for text in texts:
                text.advance(index, None, student)
            result |= tensors
            logger.info(
                "block: %d of %d, hidden-state error %.3f on held-out text, about %.0f s left",
                index + 1,
                len(model.linears),
                token_error(texts[1].dense, texts[1].hidden),
                (time.monotonic() - began) / (index + 1) * (len(model.linears) - index - 1),
            )
    return result


def _student(teacher: nn.Module, packed: dict[str, Tensors]) -> nn.Module:
    student = copy.deepcopy(teacher)
    make_student(student, packed)
    return student


def _train(
    student: nn.Module, texts: list[_Text], index: int, options: BlockOptions, seed: int
) -> bool:
    """Train block `index`; return whether its error on the second text fell."""
    train, held_out = texts
    kwargs = train.calls[index]

    def loss_on(rows: torch.Tensor) -> torch.Tensor:
        return block_error(run_block(student, train.hidden[rows], kwargs), train.dense[rows])

    layers = list(trainable_layers(student).values())
    started = [(layer, layer.latent.detach().sign()) for layer in layers]
    before = _held_out_error(student, held_out, index)
    every = math.ceil(len(train.hidden) / MARGIN_WINDOWS)  # so that all texts have a say
    few = torch.arange(0, len(train.hidden), every)
    set_margins(layers, (loss_on(row) for row in few.split(1)))
    batches = list(_batches(len(train.hidden), options, seed))
    scales = [p for layer in layers for p in (layer.factor_in, layer.factor_out)]
    groups: list[dict[str, Any]] = [
        {"params": [layer.latent for layer in layers], "lr": options.latent_lr},
        {"params": scales, "lr": options.scale_lr},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for rows in batches:
        loss_on(rows).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    after = _held_out_error(student, held_out, index)
    flips = sum(int((layer.latent.sign() != signs).sum()) for layer, signs in started)
    share = 100 * flips / sum(layer.latent.numel() for layer in layers)
    logger.info("  held-out error %.4f -> %.4f, flips %.2f %%", before, after, share)
    if not after < before:
        logger.info("  training did not lower it; the block stays as it was")
    return after < before


def _batches(windows: int, options: BlockOptions, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.epochs):
        yield from torch.randperm(windows, generator=generator).split(options.batch)


def block_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Weighted mean over tokens of |h - h_hat|^2 for hidden states [windows, T, hidden].

    It is divided by what the weights make of |h|^2, so that 1 is the error of an output of zeros.
    """
    found, wanted = found.flatten(0, 1), wanted.flatten(0, 1)
    weights = token_weights(wanted)
    size = (weights * wanted.square().sum(-1)).sum()
    return (weights * (found - wanted).square().sum(-1)).sum() / size


@torch.no_grad()
def _held_out_error(student: nn.Module, text: _Text, index: int) -> float:
    outputs = [run_block(student, part, text.calls[index]) for part in text.hidden.split(1)]
    return float(block_error(torch.cat(outputs), text.dense))
