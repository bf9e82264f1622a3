"""The losses of distillation: how far a student's logits and hidden states are from a teacher's."""

from collections.abc import Sequence
from typing import Any

import torch

CHUNK = 32  # tokens whose logits are compared at once: vocabularies are large, caches are not


class _Divergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student), chunk by chunk.

    The gradient with respect to the student's logits is softmax(student) - softmax(teacher). It is
    made in the forward pass, so that no chunk's probabilities are kept.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(student) if student.requires_grad else None
        total = torch.zeros((), device=student.device)
        for i in range(0, len(student), CHUNK):
            here = slice(i, i + CHUNK)
            log_q, log_p = (x[here].float().log_softmax(-1) for x in (student, teacher))
            p = log_p.exp()
            total += torch.dot(p.view(-1), log_p.sub_(log_q).view(-1))
            if gradient is not None:
                gradient[here] = log_q.exp_().sub_(p).div_(len(student))
        ctx.gradient = gradient
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient * grad.to(ctx.gradient.dtype), None


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student) in nats, of logits [tokens, vocabulary]."""
    result: torch.Tensor = _Divergence.apply(student, teacher)
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
