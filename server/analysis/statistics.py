"""Statistics of measurements: percentiles, summaries, and the interval of a paired ratio. Pure mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Location and spread of a sample, in the sample's own unit."""

    count: int
    mean: float
    median: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class PairedRatio:
    """Ratio of two measurements taken in pairs.

    Attributes:
        ratios: baseline / candidate for each pair; above 1 the candidate is faster.
        median: median of the ratios.
        low: lower end of the bootstrap interval of that median.
        high: upper end.
        confidence: the interval's nominal coverage, in (0, 1).
    """

    ratios: tuple[float, ...]
    median: float
    low: float
    high: float
    confidence: float

    @property
    def rounds(self) -> int:
        """How many pairs were measured."""
        return len(self.ratios)


@dataclass(frozen=True, kw_only=True)
class RatioInterval:
    """A ratio that no single pair of measurements shows, with its bootstrap interval.

    Attributes:
        rounds: pairs behind it.
        median: the ratio of medians.
        low: lower end of the interval.
        high: upper end.
        confidence: the interval's nominal coverage, in (0, 1).
    """

    rounds: int
    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class MedianInterval:
    """Bootstrap interval of a median, in the sample's own unit; `confidence` is its nominal coverage."""

    low: float
    high: float
    confidence: float


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, interpolated linearly between the two nearest order statistics.

    Args:
        samples: at least one value, in any order.
        q: in [0, 100].

    Raises:
        ValueError: no samples, or q outside [0, 100].
    """
    if not samples:
        raise ValueError("percentile of no samples")
    if not 0 <= q <= 100:
        raise ValueError(f"q must be in [0, 100], not {q}")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (position - lower)


def summarize(samples: Sequence[float]) -> Summary:
    """Count, mean, percentiles and extremes.

    Raises:
        ValueError: no samples.
    """
    median = percentile(samples, 50)
    return Summary(
        count=len(samples),
        mean=sum(samples) / len(samples),
        median=median,
        p50=median,
        p90=percentile(samples, 90),
        p99=percentile(samples, 99),
        min=min(samples),
        max=max(samples),
    )


def median_interval(
    groups: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> MedianInterval:
    """Percentile interval of the median of all samples, from resampled groups.

    Samples that were measured together (the requests of a batch) share their luck, so groups are drawn whole. With a
    group for each sample this is the plain bootstrap.

    Args:
        groups: samples that belong together; groups without samples are left out.
        seed: of the resampling; the same input gives the same interval.
        resamples: number of bootstrap samples.
        confidence: nominal coverage of the interval.

    Raises:
        ValueError: no samples, or a confidence outside (0, 1).
    """
    filled = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not filled:
        raise ValueError("interval of no samples")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    draw = np.random.default_rng(seed)
    # Resamples are drawn one at a time. All at once would be gigabytes for the largest benchmark that the server takes.
    medians = [
        np.median(np.concatenate([filled[pick] for pick in draw.integers(0, len(filled), size=len(filled))]))
        for _ in range(resamples)
    ]
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(medians, [tail, 100 - tail])
    return MedianInterval(low=float(low), high=float(high), confidence=confidence)


def relative_mad(samples: Sequence[float]) -> float:
    """Median absolute deviation over the median: a spread that one stalled sample does not inflate.

    Raises:
        ValueError: no samples, or a median that is not positive.
    """
    median = percentile(samples, 50)
    if median <= 0:
        raise ValueError(f"the spread relative to a median of {median} is undefined")
    return percentile([abs(sample - median) for sample in samples], 50) / median


def paired_ratio(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> PairedRatio:
    """Median of the paired ratios baseline / candidate, with a bootstrap percentile interval.

    Pairs are resampled whole, because a disturbance that slowed both halves of a pair cancels in its ratio. (Efron and
    Tibshirani, An Introduction to the Bootstrap, chapter 13.)

    Args:
        baseline: durations, seconds; the i-th belongs to the i-th of `candidate`.
        candidate: durations, seconds.
        seed: of the resampling; the same input gives the same interval.
        resamples: number of bootstrap samples.
        confidence: nominal coverage of the interval.

    Raises:
        ValueError: no pairs, unequal lengths, a duration that is not positive, or a confidence outside (0, 1).
    """
    if not baseline or len(baseline) != len(candidate):
        raise ValueError(f"pairs wanted, but {len(baseline)} baseline and {len(candidate)} candidate durations given")
    if min(*baseline, *candidate) <= 0:
        raise ValueError("durations must be positive")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    ratios = np.asarray(baseline, dtype=np.float64) / np.asarray(candidate, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(ratios), size=(resamples, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(medians, [tail, 100 - tail])
    return PairedRatio(
        ratios=tuple(float(ratio) for ratio in ratios),
        median=float(np.median(ratios)),
        low=float(low),
        high=float(high),
        confidence=confidence,
    )
