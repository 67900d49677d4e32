"""Two models on the same items: how sure is the difference? Pure mathematics.

Both models get the same drawn items, so an item's difficulty cancels. Two standard errors apart would miss that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import comb, inf, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
# With fewer even rows that all agree could be chance: 2 * 0.5 ** 5 is above 1 - CONFIDENCE (the sign test).
LEAST_ROWS = 6
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
# The number of picks held in memory at a time: 64 MB.
_PICKS = 8_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio candidate / reference with its bootstrap percentile interval, widened where items are too few for one.

    Attributes:
        ratio: of the two point estimates.
        low: lower end; NaN where fewer than LEAST_ROWS leave too little to resample.
        high: upper end, likewise.
        p_value: two-sided, of the ratio being 1: twice the smaller share of resamples on either side of it.
    """

    ratio: float
    low: float
    high: float
    p_value: float


def mcnemar_exact(reference_N: Floats, candidate_N: Floats) -> tuple[int, int, float]:
    """McNemar's exact test of two models' right and wrong answers.

    Only items on which the models differ tell the models apart. If both were equally good, either would win such an
    item with probability one half (McNemar 1947, the exact binomial form).

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
    # The numbers stay integers up to here: 2 ** -differing underflows long before the quotient does.
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

    Where all scores are 0 or 1 the interval is never narrower than the score interval of the difference. Items that
    both answer alike give a bootstrap nothing to draw, and five of them would look as sure as a thousand.

    Args:
        reference: one array of item scores for each task; the mean is that of the tasks' means, each task resampled
            within itself.
        candidate: likewise, on the same items.
        seed: of the resampling.
        resamples: number of bootstrap samples.
    """
    sums_2R = np.zeros((2, resamples))
    for number, (before_N, after_N) in enumerate(zip(reference, candidate, strict=True)):
        # Both sides have the same seed, so the same items are drawn.
        sums_2R[0] += _resampled_means(before_N, seed + number, resamples)
        sums_2R[1] += _resampled_means(after_N, seed + number, resamples)
    points = [sum(float(scores.mean()) for scores in side) for side in (reference, candidate)]
    if points[0] == 0:
        return Interval(ratio=float("nan"), low=float("nan"), high=float("nan"), p_value=float("nan"))
    with np.errstate(divide="ignore", invalid="ignore"):
        samples_R = sums_2R[1] / sums_2R[0]
    found = _interval(points[1] / points[0], samples_R[np.isfinite(samples_R)], sum(map(len, reference)))
    if not all(_is_binary(scores) for side in (reference, candidate) for scores in side):
        return found
    low, high = (1 + end * len(reference) / points[0] for end in _mean_difference(reference, candidate))
    return replace(found, low=float(np.fmin(found.low, max(0.0, low))), high=float(np.fmax(found.high, high)))


def paired_difference(won: int, lost: int, items: int) -> tuple[float, float]:
    """Score interval of the difference of two paired shares (Tango 1998). It has a width however few items differ.

    Args:
        won: items that the candidate alone got right.
        lost: items that the reference alone got right.
        items: number of all items.

    Returns:
        lower and upper end of candidate - reference.
    """

    def score(difference: float) -> float:
        """Standard errors by which the measured difference exceeds a supposed one; falls as the latter rises."""
        # The likeliest share of lost items under the supposed difference solves 2n q^2 + b q + c = 0.
        b = (2 * items - won + lost) * difference - won - lost
        c = -lost * difference * (1 - difference)
        share = (sqrt(max(0.0, b * b - 8 * items * c)) - b) / (4 * items)
        variance = items * (2 * share + difference * (1 - difference))
        above = won - lost - items * difference
        return above / sqrt(variance) if variance > 1e-12 else inf if above > 0 else -inf if above < 0 else 0.0

    def crossing(level: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > level else (low, middle)
        return (low + high) / 2

    return crossing(_Z), crossing(-_Z)


def paired_mean_difference(reference_N: Floats, candidate_N: Floats) -> tuple[float, float, float]:
    """Difference of two means over the same items, with the interval of Student's t for paired scores.

    Args:
        reference_N: score of each item.
        candidate_N: likewise.

    Returns:
        candidate - reference, lower and upper end; NaN ends where fewer than LEAST_ROWS leave too little to tell.
    """
    differences_N = np.asarray(candidate_N, dtype=np.float64) - np.asarray(reference_N, dtype=np.float64)
    items, middle = len(differences_N), float(differences_N.mean())
    if items < LEAST_ROWS:
        return middle, float("nan"), float("nan")
    half = student_95(items - 1) * float(differences_N.std(ddof=1)) / sqrt(items)
    return middle, middle - half, middle + half


def student_95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, by Cornish and Fisher's expansion.

    Args:
        freedom: degrees of freedom, at least 3, where it is 0.7 % too small; 0.1 % at 5.
    """
    z = _Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _mean_difference(reference: list[Floats], candidate: list[Floats]) -> tuple[float, float]:
    """Interval of the mean of several tasks' shares, put together from the tasks' own (MOVER, Zou and Donner 2008)."""
    below = above = middle = 0.0
    for before_N, after_N in zip(reference, candidate, strict=True):
        won, lost, _ = mcnemar_exact(before_N, after_N)
        difference = (won - lost) / len(before_N)
        low, high = paired_difference(won, lost, len(before_N))
        middle, below, above = middle + difference, below + (difference - low) ** 2, above + (high - difference) ** 2
    return (middle - sqrt(below)) / len(reference), (middle + sqrt(above)) / len(reference)


def _is_binary(scores_N: Floats) -> bool:
    return set(np.unique(scores_N)) <= {0.0, 1.0}


def _resampled_means(scores_N: Floats, seed: int, resamples: int) -> Floats:
    return np.concatenate([scores_N[picks_RN].mean(1) for picks_RN in _draws(len(scores_N), seed, resamples)])


def _draws(items: int, seed: int, resamples: int) -> Iterator[NDArray[np.intp]]:
    random = np.random.default_rng(seed)
    rows = max(1, _PICKS // items)
    for at in range(0, resamples, rows):
        yield random.integers(0, items, size=(min(rows, resamples - at), items))


def _interval(ratio: float, samples_R: Floats, items: int) -> Interval:
    if len(samples_R) == 0 or items < LEAST_ROWS:
        return Interval(ratio=ratio, low=float("nan"), high=float("nan"), p_value=float("nan"))
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(samples_R, [tail, 100 - tail])
    beyond = min(int((samples_R <= 1).sum()), int((samples_R >= 1).sum()))
    # The p-value is never zero: a bootstrap of R samples knows nothing about shares below 1 / R.
    p_value = min(1.0, 2 * (beyond + 1) / (len(samples_R) + 1))
    return Interval(ratio=ratio, low=float(low), high=float(high), p_value=p_value)
