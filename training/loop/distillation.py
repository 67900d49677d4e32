"""Cross-entropy and KL divergence from a teacher in one pass over the logits, with their gradient.

Autograd would keep five tensors of the logits' size in float32 and pass over memory some fifteen times, which costs a
CPU much of a step where the vocabulary is large. Here the gradient is made with the losses, a piece at a time.

Shape suffixes: B rows, T positions, N positions that count, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Numbers of a piece: its float32 copies stay in a CPU's cache, and a GPU is busy with it.
_PIECE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The losses of a micro-batch, in nats.

    Attributes:
        loss: weight * kl + (1 - weight) * cross_entropy, with its gradient.
        cross_entropy: detached.
        kl: KL(teacher || student), detached.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor


def distilled(
    student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, weight: float, num_tokens: Tensor | int | None
) -> Distilled:
    """Compare two models' predictions over the positions whose next token counts.

    Args:
        student_BTV: logits of the model in training.
        teacher_BTV: logits of the dense base, without gradient.
        labels_BT: negative ones do not count.
        weight: share of the KL divergence in the loss, in [0, 1].
        num_tokens: what the sums are divided by; None for the mean over this micro-batch.
    """
    next_BT = torch.full_like(labels_BT, -1)
    next_BT[:, :-1] = labels_BT[:, 1:]
    if num_tokens is None:
        num_tokens = max(1, int((next_BT >= 0).sum()))
    total, entropy, kl = _Distillation.apply(student_BTV, teacher_BTV, next_BT, weight)  # type: ignore[no-untyped-call]
    return Distilled(loss=total / num_tokens, cross_entropy=entropy / num_tokens, kl=kl / num_tokens)


class _Distillation(torch.autograd.Function):
    """Sums over the positions that count."""

    @staticmethod
    def forward(
        context: Any, student_BTV: Tensor, teacher_BTV: Tensor, next_BT: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher = student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1)
        targets = next_BT.flatten().to(student.device)
        counted_N = (targets >= 0).nonzero()[:, 0]
        gradient = torch.zeros_like(student)
        wide = torch.promote_types(student.dtype, torch.float32)
        entropy, kl = (torch.zeros((), dtype=wide, device=student.device) for _ in range(2))
        for rows in torch.split(counted_N, max(1, _PIECE // student.shape[1])):
            student_NV = torch.log_softmax(student[rows].to(wide), dim=-1)
            teacher_NV = torch.log_softmax(teacher[rows].to(wide), dim=-1)
            target_N1 = targets[rows][:, None]
            entropy -= student_NV.gather(1, target_N1).sum()
            expected_NV = teacher_NV.exp()
            kl += (expected_NV * teacher_NV.sub_(student_NV)).sum()
            # d loss / d logits = p_student - weight * p_teacher - (1 - weight) * one-hot
            slope_NV = student_NV.exp_().sub_(expected_NV, alpha=weight)
            slope_NV.scatter_add_(1, target_N1, torch.full_like(target_N1, weight - 1, dtype=slope_NV.dtype))
            gradient[rows] = slope_NV.to(gradient.dtype)
        context.save_for_backward(gradient.view_as(student_BTV))
        context.mark_non_differentiable(entropy, kl)
        return weight * kl + (1 - weight) * entropy, entropy, kl

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        [gradient_BTV] = context.saved_tensors
        return gradient_BTV.mul_(slopes[0]), None, None, None
