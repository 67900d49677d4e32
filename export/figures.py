"""How far two models are apart, as pure maths, and how far they may be.

Logits are compared in blocks of the vocabulary, with running sums in float64: neither a table of all positions by the
vocabulary in float64 nor a whole head has to be in memory.

Shape suffixes: P positions, V a block of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

VOCAB_BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What a model may differ by.

    Attributes:
        max_abs_over_std: largest logit difference over the logits' standard deviation.
        mean_kl_nats: mean over positions of KL(trained || other).
        top1_agreement: share of positions with the same greedy token, at least.
    """

    max_abs_over_std: float
    mean_kl_nats: float
    top1_agreement: float

    def or_wider(self, other: Tolerance) -> Tolerance:
        """The wider of both, figure by figure."""
        return Tolerance(
            max_abs_over_std=max(self.max_abs_over_std, other.max_abs_over_std),
            mean_kl_nats=max(self.mean_kl_nats, other.mean_kl_nats),
            top1_agreement=min(self.top1_agreement, other.top1_agreement),
        )


# float64 and float32: the rewriting is exact up to the order of additions. The 16-bit rows are no proof of it: there a
# lost scale moves logits by less than some models' rounding does (LOG.md, 2026-11-22), so the exporter proves the
# rewriting in float32 first, and these only tell a rounding that ruins the model. docs/parity.md has the measurements.
TOLERANCES = {
    torch.float64: Tolerance(max_abs_over_std=1e-7, mean_kl_nats=1e-10, top1_agreement=0.999),
    torch.float32: Tolerance(max_abs_over_std=1e-4, mean_kl_nats=1e-6, top1_agreement=0.999),
    torch.float16: Tolerance(max_abs_over_std=0.1, mean_kl_nats=1e-3, top1_agreement=0.97),
    torch.bfloat16: Tolerance(max_abs_over_std=0.5, mean_kl_nats=1e-2, top1_agreement=0.9),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Distance of a model from the trained one, over all positions of all prompts.

    Attributes:
        positions: how many.
        max_abs: largest difference of two logits.
        logits_std: standard deviation of the trained model's logits.
        max_abs_over_std: their ratio.
        mean_kl_nats: mean of KL(trained || other).
        top1_agreement: share of positions with the same greedy token.
    """

    positions: int
    max_abs: float
    logits_std: float
    max_abs_over_std: float
    mean_kl_nats: float
    top1_agreement: float

    def within(self, tolerance: Tolerance) -> bool:
        """All three figures are within tolerance (a NaN is not)."""
        return (
            self.max_abs_over_std <= tolerance.max_abs_over_std
            and self.mean_kl_nats <= tolerance.mean_kl_nats
            and self.top1_agreement >= tolerance.top1_agreement
        )


class Logits(Protocol):
    """Logits at a number of positions, to be had block by block."""

    @property
    def positions(self) -> int:
        """P."""
        ...

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        ...

    def block(self, start: int, stop: int) -> Tensor:
        """Logits (P, stop - start) of some tokens of the vocabulary."""
        ...

    def at(self, positions: Tensor) -> Logits:
        """Some of the positions."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeldLogits:
    """Logits in memory."""

    values_PV: Tensor

    @property
    def positions(self) -> int:
        """P."""
        return len(self.values_PV)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self.values_PV.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        """Logits (P, stop - start) of some tokens."""
        return self.values_PV[:, start:stop]

    def at(self, positions: Tensor) -> HeldLogits:
        """Some of the positions."""
        return HeldLogits(values_PV=self.values_PV[positions])


def compare_logits(trained: Logits, other: Logits) -> Figures:
    """Figures of a model whose logits at the same positions are `other`.

    With a = trained logits and b = the other's, KL = sum e^(a - A) (a - b) - A + B, where A and B are the logarithms of
    the sums of e^a and e^b. A base may pad its vocabulary with rows that no token uses; they count like all others.
    """
    assert (trained.positions, trained.vocab_size) == (other.positions, other.vocab_size)
    p, q = RunningSoftmax(trained.positions), RunningSoftmax(trained.positions)
    weighted_P = torch.zeros(trained.positions, dtype=torch.float64)
    max_abs = total = squares = 0.0
    for start in range(0, trained.vocab_size, VOCAB_BLOCK):
        stop = min(start + VOCAB_BLOCK, trained.vocab_size)
        # In float64: the sum of a vocabulary's float32 terms would drown a KL of 1e-8, or make it negative.
        a_PV, b_PV = trained.block(start, stop).double(), other.block(start, stop).double()
        shrunk_P, shares_PV = p.add(a_PV, start)
        q.add(b_PV, start)
        weighted_P = weighted_P * shrunk_P + (shares_PV * (a_PV - b_PV)).sum(1)
        # torch's max passes a NaN on; Python's would drop it.
        max_abs = float(torch.tensor([max_abs, float((a_PV - b_PV).abs().max())]).max())
        total, squares = total + float(a_PV.sum()), squares + float(a_PV.square().sum())
    count = trained.positions * trained.vocab_size
    std = math.sqrt(max(0.0, (squares - total * total / count) / (count - 1))) if math.isfinite(squares) else math.nan
    kl_P = weighted_P / p.sum_P - p.log_sum() + q.log_sum()
    return Figures(
        positions=trained.positions,
        max_abs=max_abs,
        logits_std=std,
        max_abs_over_std=max_abs / std if std else math.inf,
        mean_kl_nats=float(kl_P.mean()),
        top1_agreement=float((p.best_P == q.best_P).double().mean()),
    )


class RunningSoftmax:
    """Sum of exponentials and greedy token of logits that come block by block."""

    def __init__(self, positions: int) -> None:
        self.max_P = torch.full((positions,), -math.inf, dtype=torch.float64)
        self.sum_P = torch.zeros(positions, dtype=torch.float64)
        self.best_P = torch.zeros(positions, dtype=torch.long)

    def log_sum(self) -> Tensor:
        """Logarithm of the sum of exponentials."""
        return self.max_P + self.sum_P.log()

    def add(self, logits_PV: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """What earlier sums shrink by, and the exponentials of this block."""
        highest_P, at_P = logits_PV.max(1)
        self.best_P = torch.where(highest_P > self.max_P, at_P + start, self.best_P)
        max_P = torch.maximum(self.max_P, highest_P)
        shrunk_P = (self.max_P - max_P).exp()
        exponentials_PV = (logits_PV - max_P[:, None]).exp()
        self.sum_P = self.sum_P * shrunk_P + exponentials_PV.sum(1)
        self.max_P = max_P
        return shrunk_P, exponentials_PV


@dataclass(frozen=True, kw_only=True)
class GreedyContinuation:
    """Greedy texts of two models, each compared up to its first difference: beyond it the prompts differ.

    Attributes:
        prompts: how many were continued.
        new_tokens: by so many tokens each.
        equal: prompts with the same tokens throughout.
        widest_gap_over_std: at a first difference, by how much the trained model prefers its own token, over the
            logits' standard deviation; the widest of all prompts, 0 where all are equal.
        allowed_gap_over_std: twice the tolerance of a logit, since either of the two may be off by it;
            None where the figures are for information.
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
        logits_std: of the trained model.
        tolerance: for a logit; None allows any gap.
    """
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
        allowed_gap_over_std=2 * tolerance.max_abs_over_std if tolerance else None,
    )
