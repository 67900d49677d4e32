"""Greedy texts of two models, as pure maths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pat_serve.export.parity.figures import Tolerance


@dataclass(frozen=True, kw_only=True)
class GreedyContinuation:
    """Greedy texts of two models, each compared up to its first difference: beyond it the prompts differ.

    Attributes:
        prompts: number of continued prompts.
        new_tokens: number of new tokens of each.
        equal: number of prompts with the same tokens throughout.
        widest_gap_over_std: at a first difference, by how much the trained model prefers its own token, over the
            logits' standard deviation; the widest of all prompts, 0 where all are equal.
        allowed_gap_over_std: twice the tolerance of a logit, since either of the two may be off by it;
            None where no logit is judged.
    """

    prompts: int
    new_tokens: int
    equal: int
    widest_gap_over_std: float
    allowed_gap_over_std: float | None

    @property
    def passed(self) -> bool:
        """Every text is equal, or differs first at a tie that the tolerance does not decide."""
        return self.allowed_gap_over_std is None or self.widest_gap_over_std <= self.allowed_gap_over_std


def compare_greedy(
    trained: Sequence[Sequence[int]],
    trained_logits: Sequence[Tensor],
    other: Sequence[Sequence[int]],
    *,
    logits_std: float,
    tolerance: Tolerance | None,
) -> GreedyContinuation:
    """Compare greedy continuations.

    Args:
        trained: the trained model's new tokens, by prompt.
        trained_logits: its logits at each of them, (tokens, vocab) by prompt.
        other: the other model's new tokens.
        logits_std: deviation of the trained model's logits.
        tolerance: limits; without a limit for a logit, any gap is allowed.
    """
    limit = tolerance.max_abs_over_std if tolerance else None
    gaps = []
    for ours, logits_TV, theirs in zip(trained, trained_logits, other, strict=True):
        assert len(ours) == len(theirs)
        pairs = zip(ours, theirs, strict=True)
        differs = next((at for at, (own, others) in enumerate(pairs) if own != others), None)
        if differs is not None:
            gap = float(logits_TV[differs, ours[differs]] - logits_TV[differs, theirs[differs]])
            gaps.append(gap / logits_std if logits_std else math.inf)
    return GreedyContinuation(
        prompts=len(trained),
        new_tokens=len(trained[0]),
        equal=len(trained) - len(gaps),
        widest_gap_over_std=max(gaps, default=0.0),
        allowed_gap_over_std=None if limit is None else 2 * limit,
    )
