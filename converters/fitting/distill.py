"""Stages `qat` and `kd-scales`: train the binary model end to end on the dense model's logits.

The loss is KL(teacher || student) per token, the first term of the recipe of OneBit and BinaryMoS
(arXiv 2406.12311, section 3.3). `qat` trains latent signs, scales and routers; `kd-scales` leaves
the signs as they are, as in NanoQuant's last step (arXiv 2602.06694). The loop is transformers'
Trainer: it keeps checkpoints, continues from the last one, and runs on several processes with
torchrun. What was trained is kept only if the loss on held-out text fell.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from converters.fitting.hessian import layer_of
from converters.fitting.student import TrainableLinear, make_student, set_router_units
from converters.sources import Source

logger = logging.getLogger(__name__)

QAT, KD_SCALES = "qat", "kd-scales"
CHUNK = 256  # tokens whose logits are compared at once, as vocabularies are large
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DistillOptions:
    """What can be chosen.

    Attributes:
        tokens: of training text in all; what there is of text is repeated if need be.
        batch: windows in one step.
        latent_lr: learning rate of latent signs, whose RMS is 1.
        scale_lr: learning rate of scales and routers, relative to their start.
        spread: relative standard deviation by which equal experts are set apart.
        save_steps: steps between two checkpoints.
    """

    tokens: int = 250_000
    batch: int = 1
    latent_lr: float = 5e-3
    scale_lr: float = 3e-3
    spread: float = 0.01
    save_steps: int = 50


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of tokens [windows, T] as the Trainer wants them."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        """Windows."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window."""
        return {"input_ids": self.tokens[index]}


class _Divergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student), chunk by chunk.

    The gradient with respect to the student's logits is softmax(student) - softmax(teacher). It is
    made in the forward pass, so that no chunk's probabilities are kept.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros(())
        for s, t, g in zip(*(x.split(CHUNK) for x in (student, teacher, gradient)), strict=True):
            log_q, log_p = s.float().log_softmax(-1), t.float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum().cpu()
            g.copy_(log_q.exp_().sub_(p).div_(len(student)))
        ctx.save_for_backward(gradient)
        return (total / len(student)).to(student.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student) in nats, of logits [tokens, vocabulary]."""
    result: torch.Tensor = _Divergence.apply(student, teacher)
    return result


def load_dense(source: Source, dtype: torch.dtype) -> Any:
    """The whole dense model, in evaluation mode and without gradients."""
    from transformers import AutoModelForCausalLM

    from converters.sources.gguf import GgufSource

    gguf = {"gguf_file": source.path.name} if isinstance(source, GgufSource) else {}
    model = AutoModelForCausalLM.from_pretrained(source.files, dtype=dtype, **gguf)
    return model.eval().requires_grad_(False)


def fit(
    source: Source,
    start: Tensors,
    train: torch.Tensor,
    held_out: torch.Tensor,
    folder: Path,
    options: DistillOptions,
    seed: int,
    train_signs: bool,
) -> Tensors:
    """Train from a fit.

    Args:
        source: the dense source.
        start: the packed layers' tensors by full name.
        train: windows of training text [windows, T].
        held_out: windows to check on [windows, T].
        folder: for the Trainer's checkpoints; a run continues from the last one there.
        options: see `DistillOptions`.
        seed: of the experts' noise and of the order of windows.
        train_signs: whether the latent signs are trained too.

    Returns:
        The tensors after training, or `start` if the held-out loss did not fall.
    """
    # bfloat16 has float32's range; latents, scales and their optimizer stay in float32.
    teacher = load_dense(source, torch.bfloat16)
    student = load_dense(source, torch.bfloat16)
    packed = {module: layer_of(start, module) for module in source.modules}
    names = _names(student, source)
    make_student(student, packed, names, options.spread, seed)
    set_router_units(student, train[:1])
    before = held_out_loss(student, teacher, held_out)
    trainer = _trainer(student, teacher, train, folder, options, seed, train_signs)
    has_checkpoint = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if has_checkpoint else None)
    after = held_out_loss(student, teacher, held_out)
    logger.info("held-out KL: %.4f -> %.4f", before, after)
    if not after < before:
        logger.warning("training did not lower the held-out loss; its result is discarded")
        return start
    dtype = getattr(torch, source.scale_dtype)
    result: Tensors = {}
    flips = weights = 0
    for disk, name in names.items():
        tensors = student.get_submodule(name).pack(dtype)
        result |= {f"{disk}.{suffix}": tensor for suffix, tensor in tensors.items()}
        flips += count_flips(tensors, packed[disk])
        weights += student.get_submodule(name).latent.numel()
    logger.info("signs flipped by training: %.2f %%", 100 * flips / weights)
    return result


@torch.no_grad()
def held_out_loss(student: Any, teacher: Any, windows: torch.Tensor) -> float:
    """Mean KL(teacher || student) over windows [windows, T], in nats per token."""
    student.eval()
    losses = [
        float(divergence(student(w[None]).logits[0], teacher(w[None]).logits[0])) for w in windows
    ]
    return sum(losses) / len(losses)


def count_flips(one: Tensors, other: Tensors) -> int:
    """In how many signs two packed layers differ."""
    from vllm_bmos.checkpoint.format import WEIGHT

    bits = one[WEIGHT] ^ other[WEIGHT]
    return sum(int(((bits >> shift) & 1).sum()) for shift in range(8))


def _trainer(
    student: Any,
    teacher: Any,
    train: torch.Tensor,
    folder: Path,
    options: DistillOptions,
    seed: int,
    train_signs: bool,
) -> Any:
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    steps = max(1, options.tokens // (options.batch * train.shape[1]))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        save_steps=options.save_steps,
        save_total_limit=1,
        logging_steps=10,
        max_grad_norm=0.0,  # Adam divides by the gradient's size already
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    layers = [m for m in student.modules() if isinstance(m, TrainableLinear)]
    for layer in layers:
        layer.latent.requires_grad_(train_signs)
    latents = [layer.latent for layer in layers if train_signs]
    others = [p for layer in layers for p in (layer.factor_in, layer.factor_out, layer.router)]
    groups = [{"params": others, "lr": options.scale_lr}]
    if latents:
        groups.append({"params": latents, "lr": options.latent_lr})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)

    class Distiller(Trainer):  # type: ignore[misc,unused-ignore]
        def compute_loss(
            self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any
        ) -> torch.Tensor:
            tokens = inputs["input_ids"]
            with torch.no_grad():
                wanted = teacher.to(tokens.device)(tokens).logits.flatten(0, 1)
            return divergence(model(input_ids=tokens).logits.flatten(0, 1), wanted)

    return Distiller(
        model=student,
        args=arguments,
        train_dataset=Windows(train),
        optimizers=(optimizer, schedule),
    )


def _names(model: Any, source: Source) -> dict[str, str]:
    """Name on disk -> name in the model, of every packed layer."""
    found = {}
    for name, _ in model.named_modules():
        short = name.removeprefix(f"{model.base_model_prefix}.")
        for candidate in (name, short):
            if candidate in source.modules:
                found[candidate] = name
    return found
