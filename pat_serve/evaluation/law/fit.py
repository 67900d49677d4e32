"""The law L(D) = A + B D^-b of a held-out loss L after D tokens, with profile-likelihood intervals. Pure mathematics.

Chen et al. 2025 (P^2 law, ACL 2025, 2411.10272) find of pruned models L = L0 + rho^-g N0^-d (Nc N0^-a + Dc D^-b + E).
For one model and one cut everything except D is constant, which leaves A + B D^-b: A is what no number of tokens gets
below at this shape, with this data and this recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from pat_serve.evaluation.paired import student_95

Floats = NDArray[np.float64]

# Three numbers are fitted; with fewer points their interval would be anything.
LEAST_POINTS = 6
# Exponents from a curve that hardly bends to one that is flat after a few doublings.
_EXPONENTS = np.geomspace(0.02, 3.0, 1000)
# No more tokens than so many times those of the run are looked at: 2^40.
_MOST_TIMES = 2.0**40


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % profile-likelihood interval; an end may be infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law, and everything that its intervals need.

    Attributes:
        tokens: of each point.
        losses: held-out loss of each point, nats.
        floor: A, nats.
        scale: B, for D in units of the first point's tokens.
        exponent: b.
        residual: root of the mean squared residual, with n - 3 degrees of freedom, nats.
    """

    tokens: Floats
    losses: Floats
    floor: float
    scale: float
    exponent: float
    residual: float

    def at(self, tokens: float, *, measured: bool = False) -> Interval:
        """The loss after so many tokens.

        Args:
            tokens: of the training; infinity gives the floor.
            measured: the interval of a loss that will be measured, noise included, instead of the law's.
        """
        power = np.power(tokens / self.tokens[0], -_EXPONENTS) if np.isfinite(tokens) else np.zeros_like(_EXPONENTS)
        value = self.floor + self.scale * float(np.power(tokens / self.tokens[0], -self.exponent)) * np.isfinite(tokens)
        fits = self._profile
        room = np.clip(self._threshold(fits) - fits.squares_E, 0, None)
        half = np.sqrt(room * _form(fits, power))
        inside = fits.squares_E <= self._threshold(fits)
        middle = fits.floor_E + fits.scale_E * power
        low, high = float(np.min((middle - half)[inside])), float(np.max((middle + half)[inside]))
        # The loss of a model is no less than nothing, and so is its floor.
        low, high = max(low, 0.0), max(high, 0.0)
        if measured:
            noise = student_95(len(self.tokens) - 3) * self.residual
            low, high = value - sqrt((value - low) ** 2 + noise**2), value + sqrt((high - value) ** 2 + noise**2)
        return Interval(value=float(value), low=low, high=high)

    def tokens_for(self, loss: float) -> Interval:
        """Tokens after which the loss is reached; infinite where the floor, or an end of its interval, lies above it.

        Args:
            loss: target, nats.
        """
        floor = self.at(inf)

        def first(reached: str, end: float) -> float:
            if end >= loss:
                return inf
            low, high = 0.0, np.log2(_MOST_TIMES)
            if getattr(self.at(self.tokens[0] * 2**high), reached) > loss:
                return inf
            for _ in range(50):
                middle = (low + high) / 2
                inside = getattr(self.at(self.tokens[0] * 2**middle), reached) <= loss
                low, high = (low, middle) if inside else (middle, high)
            return float(self.tokens[0] * 2**high)

        return Interval(value=first("value", self.floor), low=first("low", floor.low), high=first("high", floor.high))

    @cached_property
    def _profile(self) -> _Fits:
        return _fits(self.tokens, self.losses)

    def _threshold(self, fits: _Fits) -> float:
        """Sum of squares up to which a law is as good as the best one, with 95 % confidence (one figure at a time)."""
        least = float(fits.squares_E.min())
        freedom = len(self.tokens) - 3
        # Points that a law fits to the last bit leave no spread at all.
        return least * (1 + student_95(freedom) ** 2 / freedom) + 1e-18


def fit_law(tokens: Floats, losses: Floats) -> Law:
    """Fit the law by least squares. For each exponent floor and scale have a closed form; neither may be negative.

    Args:
        tokens: of each point, increasing and above 0.
        losses: held-out loss of each, nats.

    Raises:
        ValueError: fewer points than LEAST_POINTS, or tokens that do not increase.
    """
    if len(tokens) < LEAST_POINTS or np.any(np.diff(tokens) <= 0) or tokens[0] <= 0:
        raise ValueError(f"a law needs at least {LEAST_POINTS} points at increasing tokens, not {len(tokens)}")
    fits = _fits(tokens, losses)
    best = int(fits.squares_E.argmin())
    return Law(
        tokens=tokens,
        losses=losses,
        floor=float(fits.floor_E[best]),
        scale=float(fits.scale_E[best]),
        exponent=float(_EXPONENTS[best]),
        residual=sqrt(float(fits.squares_E[best]) / (len(tokens) - 3)),
    )


@dataclass(frozen=True, kw_only=True)
class _Fits:
    """The best floor and scale for each exponent, and the inverse of the normal equations' matrix."""

    floor_E: Floats
    scale_E: Floats
    squares_E: Floats
    inverse_E22: Floats


def _fits(tokens: Floats, losses: Floats) -> _Fits:
    x_EN = np.power(tokens / tokens[0], -_EXPONENTS[:, None])
    count = len(tokens)
    sum_E, square_E = x_EN.sum(1), (x_EN**2).sum(1)
    cross_E = x_EN @ losses
    determinant_E = count * square_E - sum_E**2
    scale_E = (count * cross_E - sum_E * losses.sum()) / determinant_E
    # A curve that rises has no law: the best one is flat. A floor below nothing is nothing.
    scale_E = np.clip(scale_E, 0, None)
    floor_E = (losses.sum() - scale_E * sum_E) / count
    bare = floor_E < 0
    scale_E = np.where(bare, cross_E / square_E, scale_E)
    floor_E = np.where(bare, 0.0, floor_E)
    squares_E = ((losses - floor_E[:, None] - scale_E[:, None] * x_EN) ** 2).sum(1)
    inverse_E22 = np.stack([square_E, -sum_E, -sum_E, np.full_like(sum_E, count)], -1) / determinant_E[:, None]
    return _Fits(floor_E=floor_E, scale_E=scale_E, squares_E=squares_E, inverse_E22=inverse_E22.reshape(-1, 2, 2))


def _form(fits: _Fits, power_E: Floats) -> Floats:
    """The quadratic form v' M^-1 v of a loss's gradient v = (1, D^-b) in floor and scale."""
    gradient_E2 = np.stack([np.ones_like(power_E), power_E], -1)
    form_E: Floats = np.einsum("ei,eij,ej->e", gradient_E2, fits.inverse_E22, gradient_E2)
    return form_E
