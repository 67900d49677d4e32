"""The disturbances of a series of paired rounds: spread, drift, stalls, the order within a pair. Pure mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pat_serve.server.analysis.statistics import percentile, relative_mad

# A round that takes so many times the median is a stall, in which something else had the machine.
STALL_FACTOR = 3.0


@dataclass(frozen=True, kw_only=True)
class NoiseReport:
    """The noise of one regime's rounds.

    Attributes:
        baseline_spread: relative median absolute deviation of the baseline's rounds.
        candidate_spread: relative median absolute deviation of the candidate's rounds.
        ratio_spread: relative median absolute deviation of the pairs' ratios, in which a shared disturbance cancels.
        drift: median of the second half of both models' rounds over that of the first half, less 1.
        stalls: rounds in which a model took more than three times its median.
        order_effect: median ratio of the pairs that the baseline began over that of the others, less 1; None with
            fewer than two pairs of either kind.
    """

    baseline_spread: float
    candidate_spread: float
    ratio_spread: float
    drift: float
    stalls: int
    order_effect: float | None

    @property
    def spread(self) -> float:
        """The larger of the two models' spreads, by which a verdict is refused."""
        return max(self.baseline_spread, self.candidate_spread)


def noise_report(baseline: Sequence[float], candidate: Sequence[float], baseline_first: Sequence[bool]) -> NoiseReport:
    """Describe the noise of paired rounds.

    Args:
        baseline: seconds of each round, in the order of measuring.
        candidate: the same.
        baseline_first: whether the baseline began, for each round.

    Raises:
        ValueError: no rounds, or sequences of different lengths.
    """
    if not len(baseline) == len(candidate) == len(baseline_first) >= 1:
        raise ValueError("as many rounds of each model wanted, one at least")
    ratios = [one / other for one, other in zip(baseline, candidate, strict=True)]
    middle = len(baseline) // 2
    # Each model counts in units of its own median, so that both tell about the machine.
    scaled = [
        (one / percentile(baseline, 50) + other / percentile(candidate, 50)) / 2
        for one, other in zip(baseline, candidate, strict=True)
    ]
    halves = [percentile(half, 50) for half in (scaled[:middle], scaled[middle:]) if half]
    ways = [
        [ratio for ratio, first in zip(ratios, baseline_first, strict=True) if first is way] for way in (True, False)
    ]
    return NoiseReport(
        baseline_spread=relative_mad(baseline),
        candidate_spread=relative_mad(candidate),
        ratio_spread=relative_mad(ratios),
        drift=halves[-1] / halves[0] - 1,
        stalls=sum(one > STALL_FACTOR * percentile(series, 50) for series in (baseline, candidate) for one in series),
        order_effect=percentile(ways[0], 50) / percentile(ways[1], 50) - 1 if min(map(len, ways)) >= 2 else None,
    )
