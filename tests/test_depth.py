"""From two depths to the whole model: lines with known fixed and per-layer times."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from pat_serve.server.analysis.depth import DepthRatio, extrapolate, line_weights
from pat_serve.server.analysis.statistics import RatioInterval

# Seconds of a decode step of Llama-2-7B's shape and of one a quarter narrower, about as measured: fixed and a layer.
DENSE, NARROW = (0.009, 0.009), (0.0075, 0.00675)
TRUTH = (DENSE[0] + 32 * DENSE[1]) / (NARROW[0] + 32 * NARROW[1])

Rounds = list[list[float]]


def measured(
    depths: Sequence[int] = (2, 6),
    *,
    dense: tuple[float, float] = DENSE,
    narrow: tuple[float, float] = NARROW,
    count: int = 16,
    noise: float = 0.0,
    shared: float = 0.0,
    speeds: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
) -> tuple[Rounds, Rounds]:
    """Rounds at each depth; `shared` is the noise that both models of a round have in common."""
    draw = random.Random(seed)
    sides: tuple[Rounds, Rounds] = ([], [])
    for depth, speed in zip(depths, speeds, strict=False):
        common = [draw.lognormvariate(0, shared) / speed for _ in range(count)]
        for side, (fixed_s, layer_s) in zip(sides, (dense, narrow), strict=True):
            side.append([(fixed_s + depth * layer_s) * one * draw.lognormvariate(0, noise) for one in common])
    return sides


def whole(
    sides: tuple[Rounds, Rounds], depths: Sequence[int] = (2, 6), layers: tuple[int, int] = (32, 32)
) -> DepthRatio:
    found = extrapolate(depths, *sides, layers=layers)
    assert found is not None
    return found


def test_weights_of_a_line() -> None:
    assert line_weights((2, 6), 32) == pytest.approx((-6.5, 7.5))
    assert line_weights((2, 6), 6) == pytest.approx((0, 1))
    # A line through three points of a line is that line.
    for at in (0, 5, 32):
        weights = line_weights((2, 4, 6), at)
        assert sum(
            weight * (3 + 0.5 * depth) for weight, depth in zip(weights, (2, 4, 6), strict=True)
        ) == pytest.approx(3 + 0.5 * at)


def test_a_known_line_comes_out() -> None:
    found = whole(measured())
    for fit, (fixed_s, layer_s) in ((found.baseline, DENSE), (found.candidate, NARROW)):
        assert (fit.fixed_s, fit.layer_s) == pytest.approx((fixed_s, layer_s))
        assert fit.total_s == pytest.approx(fixed_s + 32 * layer_s)
        assert fit.fixed_low_s <= fit.fixed_s + 1e-12
        assert fit.layers == 32
    assert found.ratio.median == pytest.approx(TRUTH)
    assert found.ratio.rounds == 16
    # Neither of the depths shows it: fixed work hides an eighth of what the layers gain.
    two, six = ((DENSE[0] + n * DENSE[1]) / (NARROW[0] + n * NARROW[1]) for n in (2, 6))
    assert two < six < TRUTH


def test_the_two_models_may_have_depths_of_their_own() -> None:
    found = whole(measured(), layers=(32, 24))
    assert found.ratio.median == pytest.approx((DENSE[0] + 32 * DENSE[1]) / (NARROW[0] + 24 * NARROW[1]))


def covers(seed: int, **settings: float) -> bool:
    found = whole(measured(seed=seed, **settings))  # type: ignore[arg-type]
    return found.ratio.low <= TRUTH <= found.ratio.high


@pytest.mark.parametrize("settings", [{"noise": 0.01}, {"noise": 0.02, "shared": 0.1}, {"noise": 0.03, "count": 40}])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(settings: dict[str, float]) -> None:
    """A 95 % interval on 60 series: fewer than 50 hits has a chance of one in a thousand if nine of ten hold."""
    assert sum(covers(seed, **settings) for seed in range(60)) >= 50


def test_intervals_of_the_line_cover_their_truth() -> None:
    hits = [0, 0]
    for seed in range(60):
        fit = whole(measured(noise=0.01, seed=seed)).baseline
        hits[0] += fit.fixed_low_s <= DENSE[0] <= fit.fixed_high_s
        hits[1] += fit.layer_low_s <= DENSE[1] <= fit.layer_high_s
    assert min(hits) >= 50


def test_a_model_against_itself_has_a_ratio_of_one() -> None:
    found = [whole(measured(narrow=DENSE, noise=0.01, seed=seed)).ratio for seed in range(40)]
    assert sum(ratio.low <= 1 <= ratio.high for ratio in found) >= 34
    assert all(abs(ratio.median - 1) < 0.05 for ratio in found)


def test_stalls_and_a_machine_of_another_speed_at_the_other_depth_hardly_move_it() -> None:
    stalled = measured(noise=0.005)
    stalled[0][0][3] *= 10
    stalled[1][1][7] *= 10
    assert whole(stalled).ratio.median == pytest.approx(TRUTH, rel=0.02)
    # A fifth slower while the six layers were measured: the lines tell of it, the ratio does not.
    slower = whole(measured(speeds=(1.0, 0.8)))
    assert slower.baseline.layer_s > 1.2 * DENSE[1]
    assert slower.ratio.median == pytest.approx(TRUTH, rel=0.005)


def test_depths_may_have_different_numbers_of_rounds() -> None:
    slow, fast = measured(noise=0.01)
    found = whole(([slow[0], slow[1] * 2], [fast[0], fast[1] * 2]))
    assert found.ratio.rounds == 16
    assert found.ratio.median == pytest.approx(TRUTH, rel=0.03)


def test_noise_beyond_any_line_gives_none() -> None:
    """Six layers that are no slower than two."""
    slow, fast = measured()
    assert extrapolate((2, 6), [slow[1], slow[0]], [fast[1], fast[0]], layers=(32, 32)) is None
    wild = measured(noise=0.8, count=6)
    assert extrapolate((2, 6), *wild, layers=(32, 32)) is None


def test_its_ratio_can_be_judged_like_a_measured_one() -> None:
    assert isinstance(whole(measured()).ratio, RatioInterval)
