"""Durations at a few depths give the whole model's: the seconds of a layer, and the seconds beside all layers.

A decoder's layers are alike, so a step takes a + b L: b for a layer, a for all that does not repeat (embedding, output
head, sampler, scheduler). Two depths give both, and the whole model's ratio is that of two such sums. Pure mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pat_serve.server.analysis.statistics import RatioInterval

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DepthFit:
    """One model's line; each figure with its interval.

    Attributes:
        layers: of the whole model.
        fixed_s: seconds beside the layers; `fixed_low_s` to `fixed_high_s`. Noise can make it negative.
        layer_s: seconds of a layer; `layer_low_s` to `layer_high_s`.
        total_s: seconds of the whole model.
    """

    layers: int
    fixed_s: float
    fixed_low_s: float
    fixed_high_s: float
    layer_s: float
    layer_low_s: float
    layer_high_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class DepthRatio:
    """Both models' lines, and the ratio of their totals."""

    baseline: DepthFit
    candidate: DepthFit
    ratio: RatioInterval


def line_weights(depths: Sequence[int], at: float) -> tuple[float, ...]:
    """Weights of the durations at `depths` in the value that their least-squares line has at a depth.

    With two depths the line goes through both.

    Args:
        depths: numbers of layers, two different ones at least.
        at: number of layers.
    """
    mean = sum(depths) / len(depths)
    spread = sum((depth - mean) ** 2 for depth in depths)
    return tuple(1 / len(depths) + (at - mean) * (depth - mean) / spread for depth in depths)


def extrapolate(
    depths: Sequence[int],
    baseline: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    *,
    layers: tuple[int, int],
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> DepthRatio | None:
    """Both models' lines through the medians of their rounds, and the whole models' ratio, with bootstrap intervals.

    Within a depth, rounds are resampled as whole pairs, and the candidate's seconds are the baseline's over the median
    of the pairs' ratios. A disturbance that slowed both models cancels there. A machine that was slower at one depth
    than at another moves both lines alike, and their ratio little.

    Args:
        depths: numbers of layers.
        baseline: seconds of each round, for each depth.
        candidate: the same; the i-th belongs to the i-th of `baseline`.
        layers: of the whole baseline and of the whole candidate.
        seed: of the resampling; the same input gives the same intervals.
        resamples: number of bootstrap samples.
        confidence: nominal coverage of the intervals.

    Returns:
        None where noise leaves the rounds, or more than a few samples of them, without a positive duration for a whole
        model.
    """
    draw = np.random.default_rng(seed)
    sides: list[list[Array]] = [[], []]
    for baseline_s, candidate_s in zip(baseline, candidate, strict=True):
        durations = np.asarray(baseline_s, dtype=np.float64)
        ratios = durations / np.asarray(candidate_s)
        picks = draw.integers(0, len(durations), size=(resamples, len(durations)))
        # The first sample is the measured one itself.
        picks = np.concatenate([np.arange(len(durations))[None], picks])
        medians_s = np.median(durations[picks], axis=1)
        sides[0].append(medians_s)
        sides[1].append(medians_s / np.median(ratios[picks], axis=1))
    totals = [_at(depths, side, float(whole)) for side, whole in zip(sides, layers, strict=True)]
    sound = np.minimum(totals[0], totals[1]) > 0
    if not sound[0] or np.mean(~sound) > (1 - confidence) / 10:
        return None
    tails = ((1 - confidence) / 2 * 100, (1 + confidence) / 2 * 100)
    baseline_fit, candidate_fit = (_fit(depths, side, whole, tails) for side, whole in zip(sides, layers, strict=True))
    quotients = totals[0][sound] / totals[1][sound]
    low, high = np.percentile(quotients[1:], tails)
    ratio = RatioInterval(
        rounds=min(map(len, baseline)),
        median=float(quotients[0]),
        low=float(low),
        high=float(high),
        confidence=confidence,
    )
    return DepthRatio(baseline=baseline_fit, candidate=candidate_fit, ratio=ratio)


def _fit(depths: Sequence[int], samples: Sequence[Array], layers: int, tails: tuple[float, float]) -> DepthFit:
    fixed = _at(depths, samples, 0.0)
    layer = _at(depths, samples, 1.0) - fixed
    fixed_low, fixed_high = np.percentile(fixed[1:], tails)
    layer_low, layer_high = np.percentile(layer[1:], tails)
    return DepthFit(
        layers=layers,
        fixed_s=float(fixed[0]),
        fixed_low_s=float(fixed_low),
        fixed_high_s=float(fixed_high),
        layer_s=float(layer[0]),
        layer_low_s=float(layer_low),
        layer_high_s=float(layer_high),
        total_s=float(_at(depths, samples, float(layers))[0]),
    )


def _at(depths: Sequence[int], samples: Sequence[Array], at: float) -> Array:
    """The lines' values at a depth: one for each sample."""
    weighted = [weight * one for weight, one in zip(line_weights(depths, at), samples, strict=True)]
    value: Array = np.sum(weighted, axis=0)
    return value
