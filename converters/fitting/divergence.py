"""The losses of distillation: how far a student's logits and hidden states are from a teacher's."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

# Tokens whose logits are compared at once. Vocabularies are large and a processor's caches are not;
# on a GPU a chunk is a handful of launches, which should have work enough.
CPU_CHUNK, GPU_CHUNK = 8, 2048
COMPILED_CPU_CHUNK = 32  # what the compiler makes of a chunk passes over one token at a time

Compared = tuple[torch.Tensor, torch.Tensor]


def _compare(student: torch.Tensor, teacher: torch.Tensor, weight: float) -> Compared:
    """Sum over tokens of KL(teacher || student), and `weight` times the student's gradient."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(), log_q.exp().sub_(p).mul_(weight)


def _compare_with_few_exponentials(
    student: torch.Tensor, teacher: torch.Tensor, weight: float
) -> Compared:
    """The same, written for the compiler: exponentials take most of its time, here two a logit."""
    x, y = student.float(), teacher.float()
    x, y = x - x.amax(-1, keepdim=True), y - y.amax(-1, keepdim=True)
    q, p = x.exp(), y.exp()
    q_sum, p_sum = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    distance = (p * (y - x)).sum(-1, keepdim=True) / p_sum + q_sum.log() - p_sum.log()
    return distance.sum(), ((q / q_sum - p / p_sum) * weight).to(student.dtype)


@functools.cache
def _compiled_compare() -> Any:
    """Compiled on first use, as importing the compiler takes more than a second."""
    return torch.compile(_compare_with_few_exponentials, dynamic=False)


class _Divergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student), chunk by chunk.

    The gradient is made in the forward pass, so that no chunk's probabilities are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, compiled: bool
    ) -> torch.Tensor:
        compare = _compiled_compare() if compiled else _compare
        gradient = torch.empty_like(student) if student.requires_grad else None
        student = student.detach()
        total = torch.zeros((), device=student.device)
        chunk = COMPILED_CPU_CHUNK if compiled else CPU_CHUNK
        chunk = GPU_CHUNK if student.is_cuda else chunk
        for i in range(0, len(student), chunk):
            here = slice(i, i + chunk)
            distance, difference = compare(student[here], teacher[here], 1 / len(student))
            total += distance
            if gradient is not None:
                gradient[here] = difference
        ctx.gradient = gradient
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.gradient * grad.to(ctx.gradient.dtype), None, None


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, compiled: bool = False
) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student) in nats, of logits [tokens, vocabulary].

    Args:
        student: its logits.
        teacher: its logits, of the same shape.
        compiled: whether torch compiles the comparison, for as many tokens as there are.
    """
    result: torch.Tensor = _Divergence.apply(student, teacher, compiled)
    return result


def hidden_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean over layers and tokens of |h - h_hat|^2 / |h|^2.

    The paper sums plain squares; but a few tokens are a thousand times as large as the rest and
    would decide alone, and the next norm divides by |h| anyway.

    Args:
        student: h_hat of every layer, each [..., hidden].
        teacher: h likewise.
    """
    parts = []
    for h_hat, h in zip(student, teacher, strict=True):
        missing = (h_hat.float() - h.float()).square().sum(-1)
        parts.append((missing / h.float().square().sum(-1).clamp_min(1e-6)).mean())
    return torch.stack(parts).mean()
