"""The distance of two models and its limits, as pure maths.

Logits are compared in blocks of the vocabulary, with running sums in float64: neither a table of all positions by the
vocabulary in float64 nor a whole head has to be in memory.

Shape suffixes: P positions, V a block of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

VOCAB_BLOCK = 2048
_POSITION_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The limits of a model's distance from the trained one.

    Attributes:
        mean_kl_nats: mean over positions of KL(trained || other).
        max_abs_over_std: largest logit difference over the logits' standard deviation; None where it is not judged.
        median_kl_nats: median over positions of the KL; None where it is not judged.
        top1_agreement: share of positions with the same greedy token, at least; None where it is not judged.
    """

    mean_kl_nats: float
    max_abs_over_std: float | None = None
    median_kl_nats: float | None = None
    top1_agreement: float | None = None


# The rewriting is exact on paper, so two computations of it differ by the order of additions alone. There is no such
# figure for a rounding to 16 bits: what that does depends on the model (`proportional`).
TOLERANCES = {
    torch.float64: Tolerance(max_abs_over_std=1e-7, mean_kl_nats=1e-10, top1_agreement=0.999),
    torch.float32: Tolerance(max_abs_over_std=1e-4, mean_kl_nats=1e-6, top1_agreement=0.999),
}
# How many times its yardstick a rounding may move the logits: at the typical position, and over all of them. In
# pretrained models a few positions make most of the mean, and those differ tenfold from one harmless rounding to the
# next; docs/parity.md has the measurements.
TYPICAL_PROPORTION, OVERALL_PROPORTION = 3.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Distance of a model from the trained one, over all positions of all prompts.

    Attributes:
        positions: number of positions.
        max_abs: largest difference of two logits.
        logits_std: standard deviation of the trained model's logits.
        max_abs_over_std: their ratio.
        mean_kl_nats: mean of KL(trained || other).
        median_kl_nats: its median over the positions, which a few positions of a heavy tail do not move.
        top1_agreement: share of positions with the same greedy token.
    """

    positions: int
    max_abs: float
    logits_std: float
    max_abs_over_std: float
    mean_kl_nats: float
    median_kl_nats: float
    top1_agreement: float

    @property
    def finite(self) -> bool:
        """Tell whether all figures are finite."""
        return math.isfinite(self.max_abs_over_std) and math.isfinite(self.mean_kl_nats)

    def within(self, tolerance: Tolerance) -> bool:
        """Tell whether every judged figure is within the tolerance, and all are finite."""
        return (
            self.finite
            and self.mean_kl_nats <= tolerance.mean_kl_nats
            and (tolerance.max_abs_over_std is None or self.max_abs_over_std <= tolerance.max_abs_over_std)
            and (tolerance.median_kl_nats is None or self.median_kl_nats <= tolerance.median_kl_nats)
            and (tolerance.top1_agreement is None or self.top1_agreement >= tolerance.top1_agreement)
        )


def proportional(yardstick: Figures) -> Tolerance:
    """Make the limits of a rounding, as multiples of the changes that a harmless rounding makes in the same model.

    A KL grows with the square of the logits' error. The largest difference and the equal greedy tokens are not judged:
    the former belongs to a single position, and the latter counts near ties among a few hundred.

    Args:
        yardstick: figures of the harmless rounding. If they are not finite, nothing is allowed. The limits are never
            finer than the order of float32's additions.
    """
    if not yardstick.finite:
        return Tolerance(mean_kl_nats=0.0)
    least = TOLERANCES[torch.float32].mean_kl_nats
    return Tolerance(
        mean_kl_nats=max(least, OVERALL_PROPORTION**2 * yardstick.mean_kl_nats),
        median_kl_nats=max(least, TYPICAL_PROPORTION**2 * yardstick.median_kl_nats),
    )


class Logits(Protocol):
    """Logits at a number of positions, which are read block by block."""

    @property
    def positions(self) -> int:
        """The number of positions, P."""
        ...

    @property
    def vocab_size(self) -> int:
        """The size of the model's vocabulary."""
        ...

    def block(self, start: int, stop: int) -> Tensor:
        """Logits (P, stop - start) of some tokens of the vocabulary."""
        ...

    def at(self, positions: Tensor) -> Logits:
        """The logits at some of the positions."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeldLogits:
    """Logits that lie in memory."""

    values_PV: Tensor

    @property
    def positions(self) -> int:
        """The number of positions, P."""
        return len(self.values_PV)

    @property
    def vocab_size(self) -> int:
        """The size of the model's vocabulary."""
        return self.values_PV.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        """Logits (P, stop - start) of some tokens."""
        return self.values_PV[:, start:stop]

    def at(self, positions: Tensor) -> HeldLogits:
        """The logits at some of the positions."""
        return HeldLogits(values_PV=self.values_PV[positions])


@dataclass(frozen=True, kw_only=True)
class Distances:
    """The differences of two models at each position.

    Attributes:
        max_abs_P: largest difference of two logits.
        kl_P: KL(trained || other) in nats.
        equal_P: the greedy tokens are equal.
        logits_std: standard deviation of all of the trained model's logits.
    """

    max_abs_P: Tensor
    kl_P: Tensor
    equal_P: Tensor
    logits_std: float

    def figures(self) -> Figures:
        """Sum the differences up over all positions."""
        max_abs = float(self.max_abs_P.max())
        return Figures(
            positions=len(self.max_abs_P),
            max_abs=max_abs,
            logits_std=self.logits_std,
            max_abs_over_std=max_abs / self.logits_std if self.logits_std else math.inf,
            mean_kl_nats=float(self.kl_P.mean()),
            median_kl_nats=float(self.kl_P.median()),
            top1_agreement=float(self.equal_P.double().mean()),
        )


def compare_logits(trained: Logits, other: Logits) -> Figures:
    """Compute the figures of a model whose logits at the same positions are `other`."""
    return logit_distances(trained, other).figures()


def logit_distances(trained: Logits, other: Logits) -> Distances:
    """Compare two models' logits at the same positions.

    With a = trained logits and b = the other's, KL = sum e^(a - A) (a - b) - A + B, where A and B are the logarithms of
    the sums of e^a and e^b. A base may pad its vocabulary with rows that no token uses; they count like all others.
    """
    assert (trained.positions, trained.vocab_size) == (other.positions, other.vocab_size)
    p, q = RunningSoftmax(trained.positions), RunningSoftmax(trained.positions)
    weighted_P = torch.zeros(trained.positions, dtype=torch.float64)
    max_abs_P = torch.zeros(trained.positions, dtype=torch.float64)
    total = squares = 0.0
    for start in range(0, trained.vocab_size, VOCAB_BLOCK):
        stop = min(start + VOCAB_BLOCK, trained.vocab_size)
        ours_PV, theirs_PV = trained.block(start, stop), other.block(start, stop)
        # A block has so few positions that every step finds the last step's numbers in the core's cache.
        for rows in _row_slices(trained.positions):
            # The sum is in float64: the float32 sum over a vocabulary would drown a KL of 1e-8 or make it negative.
            a_PV, b_PV = ours_PV[rows].double(), theirs_PV[rows].double()
            shrunk_P, shares_PV = p.add(a_PV, start, rows)
            q.add(b_PV, start, rows)
            total, squares = total + float(a_PV.sum()), squares + float(a_PV.square().sum())
            difference_PV = a_PV - b_PV
            weighted_P[rows] = weighted_P[rows] * shrunk_P + shares_PV.mul_(difference_PV).sum(1)
            # torch's maximum passes a NaN on.
            max_abs_P[rows] = torch.maximum(max_abs_P[rows], difference_PV.abs_().amax(1))
    count = trained.positions * trained.vocab_size
    std = math.sqrt(max(0.0, (squares - total * total / count) / (count - 1))) if math.isfinite(squares) else math.nan
    return Distances(
        max_abs_P=max_abs_P,
        kl_P=weighted_P / p.sum_P - p.log_sum() + q.log_sum(),
        equal_P=p.best_P == q.best_P,
        logits_std=std,
    )


def _row_slices(positions: int) -> list[slice]:
    return [slice(start, start + _POSITION_BLOCK) for start in range(0, positions, _POSITION_BLOCK)]


class RunningSoftmax:
    """Sum of exponentials and greedy token of logits that come block by block."""

    def __init__(self, positions: int) -> None:
        self.max_P = torch.full((positions,), -math.inf, dtype=torch.float64)
        self.sum_P = torch.zeros(positions, dtype=torch.float64)
        self.best_P = torch.zeros(positions, dtype=torch.long)

    def log_sum(self) -> Tensor:
        """Logarithm of the sum of exponentials."""
        return self.max_P + self.sum_P.log()

    def add(self, logits_PV: Tensor, start: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Add a block; return the factors by which earlier sums shrink, and the block's exponentials."""
        highest_P, at_P = logits_PV.max(1)
        self.best_P[rows] = torch.where(highest_P > self.max_P[rows], at_P + start, self.best_P[rows])
        max_P = torch.maximum(self.max_P[rows], highest_P)
        shrunk_P = (self.max_P[rows] - max_P).exp()
        exponentials_PV = (logits_PV - max_P[:, None]).exp_()
        self.sum_P[rows] = self.sum_P[rows] * shrunk_P + exponentials_PV.sum(1)
        self.max_P[rows] = max_P
        return shrunk_P, exponentials_PV
