"""Stages `qat`, `kd-scales` and `experts`: train the binary model end to end on the dense one.

The loss is KL(teacher || student) per token plus `hidden` times the distance of the blocks' outputs
(OneBit and BinaryMoS, arXiv 2406.12311, section 3.3). `qat` trains latent signs and scales;
`kd-scales` leaves the signs as they are, as in NanoQuant's last step (arXiv 2602.06694); `experts`
trains all that and routers, after experts.py has split them. What was trained is kept only if the
loss on held-out text fell.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from converters.fitting.attention import use_fast_attention
from converters.fitting.distributed import device, has_gpu
from converters.fitting.divergence import divergence
from converters.fitting.experts import merge_where_useless, split, with_experts
from converters.fitting.margins import MARGIN_WINDOWS, set_margins
from converters.fitting.memory import keep_freed_memory
from converters.fitting.models import (
    compile_blocks,
    load_dense,
    load_student,
    module_names,
    pack_student,
)
from converters.fitting.precision import model_dtype
from converters.fitting.student import set_router_units, trainable_layers
from converters.fitting.training import DistillOptions, last_checkpoint, loss_on, make_trainer
from converters.sources import Source
from vllm_bmos.checkpoint.format import WEIGHT

logger = logging.getLogger(__name__)

QAT, KD_SCALES, EXPERTS = "qat", "kd-scales", "experts"
Tensors = dict[str, torch.Tensor]


def fit(
    source: Source,
    start: Tensors,
    train: torch.Tensor,
    held_out: torch.Tensor,
    folder: Path,
    options: DistillOptions,
    stage: str,
    E: int,
    seed: int,
    threads: int = 0,
) -> Tensors:
    """Train from a fit.

    Args:
        source: the dense source.
        start: the packed layers' tensors by full name; equal experts are trained as one.
        train: windows of training text [windows, T].
        held_out: windows to check on [windows, T].
        folder: for the Trainer's checkpoints; a run continues from the last one there.
        options: see `DistillOptions`.
        stage: kd-scales, qat or experts.
        E: into how many experts `experts` splits one; different experts of the start stay.
        seed: of the order of windows and of the experts' clusters.
        threads: of each op; 0 takes torch's choice.

    Returns:
        The tensors after training, or `start` if the held-out loss did not fall.
    """
    if threads:
        torch.set_num_threads(threads)
    if not has_gpu():
        keep_freed_memory()
    teacher = load_dense(source, model_dtype(), use_cache=False).to(device())
    student = load_student(source, with_experts(start, source.modules, 1))
    before = held_out_loss(student, teacher, held_out)
    logger.info("held-out KL before training: %.4f (both models in %s)", before, teacher.dtype)
    experts = stage == EXPERTS and E > 1
    if experts and all(layer.E == 1 for layer in trainable_layers(student).values()):
        apart = split(student, train, E, seed)
        names = module_names(student, source)
        split_start = {
            f"{disk}.{suffix}": t for disk, n in names.items() for suffix, t in apart[n].items()
        }
        del student  # before there is another
        student = load_student(source, split_start)
    set_router_units(student, train[:1].to(device()))
    if options.compile:
        if not has_gpu():  # a sliding window may be shorter than one and longer than the other
            use_fast_attention(student, max(train[:1], held_out[:1], key=lambda w: w.shape[1]))
        compile_blocks(student)
        compile_blocks(teacher)
    checkpoint = last_checkpoint(folder)
    if stage != KD_SCALES and checkpoint is None:
        # One at a time: margins depend neither on the batch nor on the number of processes.
        windows = train[:MARGIN_WINDOWS].to(device()).split(1)
        logger.info("what flips cost is measured on %d windows", len(windows))
        losses = (loss_on(student, teacher, window, options)[0] for window in windows)
        with torch.compiler.set_stance("force_eager"):
            set_margins(list(trainable_layers(student).values()), losses)
    trainer = make_trainer(student, teacher, train, folder, options, seed, stage != KD_SCALES)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if experts:
        merge_where_useless(student, lambda: held_out_loss(student, teacher, held_out))
    after = held_out_loss(student, teacher, held_out)
    logger.info("held-out KL: %.4f -> %.4f", before, after)
    if not after < before:
        logger.warning("training did not lower the held-out loss; its result is discarded")
        return start
    result = pack_student(student, source)
    flips = sum(count_flips(result[n], start[n]) for n in start if n.endswith(f".{WEIGHT}"))
    weights = sum(N * K for N, K in source.modules.values())
    logger.info("signs flipped by training: %.2f %%", 100 * flips / weights)
    return result


@torch.no_grad()
def held_out_loss(student: Any, teacher: Any, windows: torch.Tensor) -> float:
    """Mean KL(teacher || student) over windows [windows, T], in nats per token."""
    student.eval()
    total = 0.0
    with torch.compiler.set_stance("force_eager"):  # other shapes than training's: not worth it
        for part in windows.to(student.device).split(8 if student.device.type == "cuda" else 1):
            pair = (model(part).logits.flatten(0, 1) for model in (student, teacher))
            total += len(part) * float(divergence(*pair))
    return total / len(windows)


def count_flips(one: torch.Tensor, other: torch.Tensor) -> int:
    """In how many signs two packed weights differ."""
    bits = one ^ other
    return sum(int(((bits >> shift) & 1).sum()) for shift in range(8))
