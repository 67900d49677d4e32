import numpy as np
import pytest

from pat_serve.server.analysis.statistics import median_interval, paired_ratio, percentile, relative_mad, summarize


@pytest.mark.parametrize(("q", "expected"), [(0, 1.0), (25, 1.75), (50, 2.5), (90, 3.7), (100, 4.0)])
def test_percentile_interpolates_linearly(q: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(expected)


def test_percentile_agrees_with_numpy() -> None:
    samples = list(np.random.default_rng(0).exponential(size=37))
    for q in (0, 1, 12.5, 50, 90, 99, 99.9, 100):
        assert percentile(samples, q) == pytest.approx(float(np.percentile(samples, q)))


def test_percentile_refuses_what_has_no_answer() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)
    with pytest.raises(ValueError, match="101"):
        percentile([1.0], 101)


def test_summarize() -> None:
    summary = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (summary.count, summary.min, summary.max) == (5, 1.0, 5.0)
    assert summary.mean == summary.median == summary.p50 == 3.0
    assert summary.p90 == pytest.approx(4.6)
    assert summary.p99 == pytest.approx(4.96)


def test_relative_mad() -> None:
    # Deviations from the median 11 are 2, 1, 0, 1, 89: one stalled sample leaves their median at 1.
    assert relative_mad([9.0, 10.0, 11.0, 12.0, 100.0]) == pytest.approx(1 / 11)
    assert relative_mad([2.0, 2.0, 2.0]) == 0.0
    with pytest.raises(ValueError, match="undefined"):
        relative_mad([0.0, 0.0])


def test_paired_ratio_of_exact_pairs() -> None:
    # The machine slows down threefold in the middle; in pairs that cancels.
    pair = paired_ratio([4.0, 12.0, 12.0, 4.0, 4.0], [3.0, 9.0, 9.0, 3.0, 3.0])
    assert pair.ratios == pytest.approx([4 / 3] * 5)
    assert (pair.low, pair.median, pair.high) == pytest.approx((4 / 3, 4 / 3, 4 / 3))


def test_paired_ratio_by_hand() -> None:
    pair = paired_ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0], confidence=0.9)
    assert pair.median == 3.0
    # A resample's median is 2 with probability 7/27, 3 with 13/27, 4 with 7/27.
    assert (pair.low, pair.high) == (2.0, 4.0)


def test_paired_ratio_is_repeatable() -> None:
    draw = np.random.default_rng(3)
    baseline, candidate = list(draw.uniform(1, 2, 9)), list(draw.uniform(1, 2, 9))
    assert paired_ratio(baseline, candidate, seed=1) == paired_ratio(baseline, candidate, seed=1)


@pytest.mark.parametrize(
    ("baseline", "candidate", "message"),
    [([], [], "pairs wanted"), ([1.0], [1.0, 2.0], "pairs wanted"), ([1.0, 0.0], [1.0, 1.0], "positive")],
)
def test_paired_ratio_refuses_what_is_no_pair(baseline: list[float], candidate: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_ratio(baseline, candidate)


@pytest.mark.parametrize("rounds", [6, 12, 25])
def test_interval_covers_the_true_ratio_at_about_the_nominal_rate(rounds: int) -> None:
    draw = np.random.default_rng(rounds)
    true_ratio, trials, covered = 1.33, 400, 0
    for trial in range(trials):
        # A drift that both halves of a pair share, and noise of each half's own.
        drift = np.exp(draw.normal(0, 0.3, rounds))
        baseline = true_ratio * drift * np.exp(draw.normal(0, 0.05, rounds))
        candidate = drift * np.exp(draw.normal(0, 0.05, rounds))
        pair = paired_ratio(list(baseline), list(candidate), seed=trial, resamples=1000)
        covered += pair.low <= true_ratio <= pair.high
    assert 0.90 <= covered / trials <= 0.99


def test_median_interval_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        interval = median_interval([[value] for value in draw.normal(3.0, 1.0, size=41)], seed=trial, resamples=400)
        covered += interval.low <= 3.0 <= interval.high
    assert 88 <= covered <= 100


def test_median_interval_draws_groups_whole() -> None:
    # Five batches of eight that have one value each: five independent samples, not forty.
    groups = [[float(value)] * 8 for value in (1, 2, 3, 4, 5)]
    whole = median_interval(groups)
    single = median_interval([[sample] for group in groups for sample in group])
    assert whole.high - whole.low > single.high - single.low > 0
    assert median_interval([[2.0], []]).low == 2.0
    with pytest.raises(ValueError, match="no samples"):
        median_interval([[], []])
    with pytest.raises(ValueError, match="confidence"):
        median_interval([[1.0]], confidence=1.0)
