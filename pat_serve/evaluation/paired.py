"""Two models on the same items: how sure is the difference? Pure mathematics.

Items are drawn together, so what makes one of them hard cancels; a comparison of two standard errors would miss that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Picks held in memory at a time: 64 MB.
_PICKS = 8_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio candidate / reference with its bootstrap percentile interval.

    Attributes:
        ratio: of the two point estimates.
        low: lower end; NaN where a single item leaves nothing to resample.
        high: upper end, likewise.
        p_value: two-sided, of the ratio being 1: twice the smaller share of resamples on either side of it.
    """

    ratio: float
    low: float
    high: float
    p_value: float


def mcnemar_exact(reference_N: Floats, candidate_N: Floats) -> tuple[int, int, float]:
    """McNemar's exact test of two models' right and wrong answers.

    Only items on which the models differ tell them apart; were they equally good, each of these would fall to either
    with probability one half (McNemar 1947, the exact binomial form).

    Args:
        reference_N: 1 for a right answer, 0 for a wrong one.
        candidate_N: likewise, on the same items.

    Returns:
        items that the candidate alone got right, items that the reference alone got right, two-sided p-value.
    """
    before, after = np.asarray(reference_N) > 0.5, np.asarray(candidate_N) > 0.5
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    differing = won + lost
    if differing == 0:
        return 0, 0, 1.0
    tail = sum(comb(differing, k) for k in range(min(won, lost) + 1))
    # Integers up to here: 2 ** -differing underflows long before the quotient does.
    return won, lost, min(1.0, 2 * tail / 2**differing)


def perplexity_ratio(
    reference_sums_N: Floats, candidate_sums_N: Floats, counts_N: Floats, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Ratio of two perplexities over the same tokens, rows or windows resampled whole.

    Args:
        reference_sums_N: summed negative log-likelihood of each row, nats.
        candidate_sums_N: likewise.
        counts_N: scored tokens of each row, the same for both.
        seed: of the resampling.
        resamples: number of bootstrap samples.
    """
    differences_N = np.asarray(candidate_sums_N, dtype=np.float64) - np.asarray(reference_sums_N, dtype=np.float64)
    counts_N = np.asarray(counts_N, dtype=np.float64)

    point = float(differences_N.sum() / counts_N.sum())
    samples_R = np.concatenate(
        [
            differences_N[picks_RN].sum(1) / counts_N[picks_RN].sum(1)
            for picks_RN in _draws(len(counts_N), seed, resamples)
        ]
    )
    return _interval(float(np.exp(point)), np.exp(samples_R), len(counts_N))


def mean_ratio(
    reference: list[Floats], candidate: list[Floats], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Ratio of two means over the same items: of accuracies, say.

    Args:
        reference: one array of item scores for each task; the mean is that of the tasks' means, each task resampled
            within itself.
        candidate: likewise, on the same items.
        seed: of the resampling.
        resamples: number of bootstrap samples.
    """
    sums_2R = np.zeros((2, resamples))
    for number, (before_N, after_N) in enumerate(zip(reference, candidate, strict=True)):
        # The same seed for both sides: the same items are drawn.
        sums_2R[0] += _resampled_means(before_N, seed + number, resamples)
        sums_2R[1] += _resampled_means(after_N, seed + number, resamples)
    points = [sum(float(scores.mean()) for scores in side) for side in (reference, candidate)]
    if points[0] == 0:
        return Interval(ratio=float("nan"), low=float("nan"), high=float("nan"), p_value=float("nan"))
    with np.errstate(divide="ignore", invalid="ignore"):
        samples_R = sums_2R[1] / sums_2R[0]
    return _interval(points[1] / points[0], samples_R[np.isfinite(samples_R)], max(map(len, reference)))


def _resampled_means(scores_N: Floats, seed: int, resamples: int) -> Floats:
    return np.concatenate([scores_N[picks_RN].mean(1) for picks_RN in _draws(len(scores_N), seed, resamples)])


def _draws(items: int, seed: int, resamples: int) -> Iterator[NDArray[np.intp]]:
    random = np.random.default_rng(seed)
    rows = max(1, _PICKS // items)
    for at in range(0, resamples, rows):
        yield random.integers(0, items, size=(min(rows, resamples - at), items))


def _interval(ratio: float, samples_R: Floats, items: int) -> Interval:
    if len(samples_R) == 0 or items < 2:
        return Interval(ratio=ratio, low=float("nan"), high=float("nan"), p_value=float("nan"))
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(samples_R, [tail, 100 - tail])
    beyond = min(int((samples_R <= 1).sum()), int((samples_R >= 1).sum()))
    # Never zero: a bootstrap of R samples knows nothing of shares below 1 / R.
    p_value = min(1.0, 2 * (beyond + 1) / (len(samples_R) + 1))
    return Interval(ratio=ratio, low=float(low), high=float(high), p_value=p_value)
