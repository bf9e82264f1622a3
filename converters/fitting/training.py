"""The loop that trains a student on a teacher: transformers' Trainer, with our loss and order.

It keeps checkpoints, continues from the last one, and runs on several processes with torchrun.
"""

import json
import logging
import math
import shutil
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler, SequentialSampler

from converters.fitting.distributed import has_gpu, is_main, wait_for_all
from converters.fitting.divergence import divergence, hidden_distance
from converters.fitting.margins import latent_rate
from converters.fitting.student import trainable_layers
from vllm_bmos.checkpoint.format import FormatError

logger = logging.getLogger(__name__)

LOG_STEPS = 10


@dataclass(frozen=True)
class DistillOptions:
    """What can be chosen.

    Attributes:
        tokens: of training text in all; what there is of text is repeated if need be.
        length: tokens in a window; attention's cost grows with it.
        batch: windows in one step of one process.
        latent_lr: learning rate of latent signs, relative to the least distance from a flip; None
            for that of `latent_rate`.
        scale_lr: learning rate of scales and routers, relative to their start.
        hidden: weight of the hidden states' distance; 0 leaves it out.
        save_steps: steps between two checkpoints.
        compile: whether torch compiles the decoder blocks.
        fsdp: whether the processes share the student's parameters and what Adam keeps of them.
    """

    tokens: int = 250_000
    length: int = 512
    batch: int = 2
    latent_lr: float | None = None
    scale_lr: float = 5e-3
    hidden: float = 0.0
    save_steps: int = 25
    compile: bool = False
    fsdp: bool = False


def tokens_of(options: DistillOptions, length: int, processes: int) -> int:
    """On how many tokens whole steps train: up to `options.tokens`, in windows of `length`.

    Raises:
        FormatError: if those are not enough for one step.
    """
    step = options.batch * length * processes
    if options.tokens < step:
        raise FormatError(
            f"--tokens {options.tokens}: one step takes {step}, {options.batch} windows of "
            f"{length} for each of {processes} processes. Give more, or a smaller --batch."
        )
    return options.tokens // step * step


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of text in the order in which they are trained on.

    One epoch for the Trainer, however often the text is repeated: of a run with several epochs and
    processes, it does not find the place again. And every step is full.

    Args:
        tokens: the text [windows, T].
        count: how many windows are trained on; each pass over the text has an order of its own.
        seed: of these orders.
    """

    def __init__(self, tokens: torch.Tensor, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        passes = range(math.ceil(count / len(tokens)))
        orders = [torch.randperm(len(tokens), generator=generator) for _ in passes]
        self.tokens, self.order = tokens, torch.cat(orders)[:count]

    def __len__(self) -> int:
        """Windows."""
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window, as the Trainer wants it."""
        return {"input_ids": self.tokens[self.order[index]]}


def last_checkpoint(folder: Path) -> Path | None:
    """The Trainer's newest whole checkpoint, or None; what a kill left of others is deleted.

    The Trainer writes a checkpoint in place, its state last, and deletes the one before after that.
    """

    def is_whole(path: Path) -> bool:
        try:
            return "global_step" in json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False

    if is_main():
        for path in folder.glob("checkpoint-*"):
            if not is_whole(path):
                logger.info("%s was not written whole: it is deleted", path.name)
                shutil.rmtree(path)
    wait_for_all()
    steps = {int(path.name.partition("-")[2]): path for path in folder.glob("checkpoint-*")}
    return steps[max(steps)] if steps else None


def loss_on(
    student: Any, teacher: Any, tokens: torch.Tensor, options: DistillOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """What training minimises, and KL(teacher || student) alone, on windows [windows, T]."""
    hidden = options.hidden > 0
    with torch.no_grad():
        wanted = teacher(tokens, output_hidden_states=hidden)
    found = student(input_ids=tokens, output_hidden_states=hidden)
    q, p = (outputs.logits.flatten(0, 1) for outputs in (found, wanted))
    loss = kl = divergence(q, p, options.compile)
    if hidden:
        distance = hidden_distance(found.hidden_states[1:], wanted.hidden_states[1:])
        loss = kl + options.hidden * distance
    return loss, kl.detach()


def make_trainer(
    student: Any,
    teacher: Any,
    train: torch.Tensor,
    folder: Path,
    options: DistillOptions,
    seed: int,
    train_signs: bool,
) -> Any:
    """The Trainer of a student.

    Args:
        student: the model with trainable layers.
        teacher: the dense model.
        train: windows of training text [windows, T].
        folder: for its checkpoints.
        options: see `DistillOptions`.
        seed: of the order of windows.
        train_signs: whether latent signs are trained, or scales and routers alone.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,  # set below: the number of processes is known then
        per_device_train_batch_size=options.batch,
        save_steps=options.save_steps,
        save_total_limit=1,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for the device in every step
        max_grad_norm=1.0,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        lr_scheduler_type="cosine",
        fsdp=options.fsdp,
        fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"} if options.fsdp else None,
        use_cpu=not has_gpu(),
        ddp_find_unused_parameters=False,  # all that is trained is used in every step
    )
    arguments._n_gpu = 1  # each process has one; several take torchrun, not threads of one process
    length, processes = train.shape[1], arguments.world_size
    windows = tokens_of(options, length, processes) // length
    steps = windows // (options.batch * processes)
    arguments.max_steps, arguments.warmup_steps = steps, steps // 10
    latent_lr = latent_rate(steps) if options.latent_lr is None else options.latent_lr
    layers = list(trainable_layers(student).values())
    for layer in layers:
        layer.latent.requires_grad_(train_signs)
        layer.router.requires_grad_(layer.E > 1)
    losses: deque[torch.Tensor] = deque(maxlen=LOG_STEPS)

    class Distiller(Trainer):  # type: ignore[misc,unused-ignore]
        def _get_train_sampler(self, *_: Any) -> Sampler[int]:
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
            latents = [layer.latent for layer in layers if train_signs]
            others = [p for layer in layers for p in (layer.factor_in, layer.factor_out)]
            others += [layer.router for layer in layers if layer.E > 1]
            groups = [{"params": others, "lr": options.scale_lr}]
            if latents:
                logger.info("learning rate of latent signs: %.3g (%d steps)", latent_lr, steps)
                groups.append({"params": latents, "lr": latent_lr})
            self.optimizer = torch.optim.AdamW(
                groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True
            )
            return self.optimizer

        def compute_loss(
            self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any
        ) -> torch.Tensor:
            model.eval()  # the teacher has no dropout to learn
            loss, kl = loss_on(model, teacher, inputs["input_ids"], options)
            losses.append(kl)
            return loss

    class Progress(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            self.began, self.first = time.monotonic(), state.global_step
            trained = [p for p in model.parameters() if p.requires_grad]
            here = sum(
                p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trained
            )
            logger.info("trained here: %d of %d values", here, sum(p.numel() for p in trained))

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            done = state.global_step
            if done % LOG_STEPS == 0 or done == steps:
                left = (time.monotonic() - self.began) / (done - self.first) * (steps - done)
                mean = float(torch.stack(list(losses)).mean())
                logger.info("step %d of %d: KL %.3f, about %.0f s left", done, steps, mean, left)

    trainer = Distiller(
        model=student,
        args=arguments,
        train_dataset=Windows(train, windows, seed),
        callbacks=[Progress()] if is_main() else [],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for the report
    if options.fsdp and not trainer.is_fsdp_enabled:
        raise FormatError("--fsdp: accelerate has no FSDP for this device. Leave it out.")
    return trainer
