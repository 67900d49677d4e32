"""The tester tested: from rounds with a known truth to verdict, noise report, precision and advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from pat_serve.server.analysis.capacity import capacity, memory_for
from pat_serve.server.analysis.noise import noise_report
from pat_serve.server.analysis.precision import relative_width, rounds_for_verdict, rounds_for_width
from pat_serve.server.analysis.statistics import PairedRatio, paired_ratio
from pat_serve.server.analysis.verdict import Claim, Verdict
from pat_serve.server.bench.latency.summary import Floors
from pat_serve.server.bench.speedup import series as speedup_series
from pat_serve.server.bench.speedup.advice import advise
from pat_serve.server.bench.speedup.analysis import conclude, conclude_average, surroundings_of
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.result import WarmUp
from pat_serve.server.bench.speedup.series import measure_rounds
from pat_serve.server.engine.workers.probe import MachineRates
from tests.speedup_records import DENSE, NARROW, pair, rounds, trace

PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
STRICT = Claim(ratio=1.33, margin=0.0)


@pytest.mark.parametrize(
    ("truth", "disturbance", "verdict"),
    [
        (1.40, {}, PASS),
        (1.25, {}, FAIL),
        (1.00, {}, FAIL),
        (0.50, {}, FAIL),
        # A machine that slows down by half while it is measured: it cancels in the pairs.
        (1.40, {"drift": 0.5}, PASS),
        (1.25, {"drift": 0.5}, FAIL),
        # Rounds in which something else had the machine.
        (1.40, {"stalled": (3, 8)}, PASS),
        (1.25, {"stalled": (3, 8)}, FAIL),
        # So noisy that nothing may be said, however clear the ratio is.
        (3.00, {"noise": 0.5}, INCONCLUSIVE),
        (0.50, {"noise": 0.5}, INCONCLUSIVE),
        # Too close to tell on so few rounds.
        (1.33, {"noise": 0.05}, INCONCLUSIVE),
    ],
)
def test_known_ratio_in_known_verdict_out(truth: float, disturbance: dict[str, Any], verdict: Verdict) -> None:
    measured = rounds(16, ratio=truth, **disturbance)
    regimes = pair(claim=1.33, margin=0.0).analyse(measured)
    assert [result.verdict for result in regimes] == [verdict, verdict]
    assert conclude(regimes, measured, STRICT).verdict is verdict
    if verdict is not INCONCLUSIVE:
        assert all(result.ratio.median == pytest.approx(truth, rel=0.03) for result in regimes)


def test_a_model_against_itself_never_passes_a_claim_of_more() -> None:
    verdicts = [pair(claim=1.33).analyse(rounds(12, ratio=1.0, noise=0.08, seed=seed))[0].verdict for seed in range(40)]
    assert PASS not in verdicts
    no_difference = [pair(claim=1.0).analyse(rounds(12, ratio=1.0, noise=0.05, seed=seed))[0] for seed in range(40)]
    # The interval is a 95 % one: a few of forty miss 1.
    assert sum(result.ratio.low <= 1 <= result.ratio.high for result in no_difference) >= 34


def test_noise_report_tells_drift_stall_and_order() -> None:
    quiet = pair().analyse(rounds(12, ratio=1.3, noise=0.01))[0].noise
    assert quiet.spread < 0.03
    assert abs(quiet.drift) < 0.03
    assert quiet.stalls == 0
    drifting = pair().analyse(rounds(12, ratio=1.3, noise=0.01, drift=0.6))[0].noise
    assert drifting.drift > 0.2
    assert drifting.ratio_spread < 0.03 < drifting.spread
    assert pair().analyse(rounds(12, ratio=1.3, noise=0.01, stalled=(4,)))[0].noise.stalls == 1
    # Whoever comes first is slower by a tenth: both ways of it together would hide that.
    baseline = [1.1, 1.0] * 4
    candidate = [1.0, 1.1] * 4
    effect = noise_report(baseline, candidate, [True, False] * 4).order_effect
    assert effect == pytest.approx(1.1 * 1.1 - 1)
    assert noise_report([1.0], [1.0], [True]).order_effect is None


def ratio_of(median: float, half: float, count: int) -> PairedRatio:
    return PairedRatio(ratios=(median,) * count, median=median, low=median - half, high=median + half, confidence=0.95)


def test_rounds_that_a_precision_takes_are_about_right() -> None:
    few = rounds(12, ratio=1.3, noise=0.04)
    first = pair().analyse(few)[0].ratio
    wanted = relative_width(first) / 2
    needed = rounds_for_width(first, wanted)
    assert 40 < needed < 80
    assert relative_width(pair().analyse(rounds(needed, ratio=1.3, noise=0.04, seed=5))[0].ratio) < 1.3 * wanted
    assert rounds_for_width(first, 1.0) == 12


def test_rounds_that_a_verdict_takes() -> None:
    assert rounds_for_verdict(ratio_of(1.40, 0.05, 10), 1.33) == 10
    # Twice as far as the interval may reach: four times as many, and a fifth for safety.
    assert rounds_for_verdict(ratio_of(1.35, 0.04, 10), 1.33) == 48
    assert rounds_for_verdict(ratio_of(1.31, 0.04, 10), 1.33) == 48
    assert rounds_for_verdict(ratio_of(1.33, 0.04, 10), 1.33) is None
    assert rounds_for_verdict(ratio_of(1.3301, 0.04, 10), 1.33) is None


def advice(measured: Sequence[Any], *, others: float = 0.0, settled: bool = True, **settings: Any) -> str:
    settings = {"margin": 0.0, **settings}
    measured = [one.model_copy(update={"other_cpu_share": others}) for one in measured]
    warm_ups = [WarmUp(traces=(), stationary=settled)]
    regimes, surroundings = pair(**settings).analyse(measured, warm_ups), surroundings_of(measured, warm_ups)
    claim = Claim(ratio=settings["claim"], margin=settings["margin"])
    return " | ".join(advise(regimes, None, claim=claim, seconds_per_round=6.0, surroundings=surroundings))


def test_an_inconclusive_check_says_what_would_decide_it() -> None:
    close = advice(rounds(12, ratio=1.35, noise=0.05), claim=1.33)
    assert "rounds in all" in close
    assert "--rounds" in close
    assert "min more" in close
    noisy = advice(rounds(12, ratio=1.5, noise=0.5), claim=1.33, others=0.31)
    assert "end other processes (they took 31% of it)" in noisy
    assert "--rounds" not in noisy
    exact = [one.model_copy(update={"candidate": one.baseline}) for one in rounds(12, ratio=1.0)]
    assert advice(exact, claim=1.0) == ""
    same = rounds(12, ratio=1.33, noise=0.0001)
    medians = [result.ratio.median for result in pair().analyse(same)]
    assert "no sensible number of rounds decides" in advice(same, claim=medians[0])


def test_a_ratio_at_the_claim_itself_passes_within_the_margin_and_never_strictly() -> None:
    """A candidate exactly as fast as claimed shows an interval that holds the claim, on 40 series."""
    found = [pair(claim=1.33).analyse(rounds(24, ratio=1.33, noise=0.01, seed=seed))[0] for seed in range(40)]
    assert sum(result.verdict is PASS for result in found) >= 38
    assert sum(result.strict_verdict is INCONCLUSIVE for result in found) >= 34
    # A candidate that misses the threshold by little passes no oftener than the interval's 2.5 % allow.
    below = [pair(claim=1.33).analyse(rounds(24, ratio=1.297, noise=0.01, seed=seed))[0] for seed in range(40)]
    assert sum(result.verdict is PASS for result in below) <= 2
    judgement = conclude([found[0]], rounds(24, ratio=1.33), Claim(ratio=1.33))
    assert (judgement.verdict, judgement.strict) == (found[0].verdict, found[0].strict_verdict)


def test_advice_aims_at_the_margin_s_threshold() -> None:
    measured = rounds(12, ratio=1.303, noise=0.0001)
    threshold = pair().analyse(measured)[0].ratio.median
    told = advice(measured, claim=threshold / 0.98, margin=0.02)
    assert "no sensible number of rounds decides" in told
    assert f"too close to {threshold:.4g}" in told
    assert f"a claim up to {1.303 / 0.98:.2f}" in told
    [result, _] = pair(claim=1.33).analyse(rounds(12, ratio=1.33, noise=0.06))
    strict = pair(claim=1.33, margin=0.0).analyse(rounds(12, ratio=1.33, noise=0.06))[0]
    assert result.rounds_needed == rounds_for_verdict(result.ratio, 1.33 * 0.98)
    assert result.rounds_needed != strict.rounds_needed


def test_several_batch_sizes_are_judged_one_by_one_and_on_average() -> None:
    both = pair(claim=1.33, batch_sizes=(1, 4), regimes=("prefill",))
    slow, fast = rounds(12, ratio=1.2), rounds(12, ratio=1.6, batch_sizes=(4,), seed=1)
    regimes = both.analyse([*slow, *fast])
    assert [(result.batch_size, result.verdict) for result in regimes] == [(1, FAIL), (4, PASS)]
    average = both.average(regimes)
    assert average is not None
    assert average.median == pytest.approx((1.2 * 1.6) ** 0.5, rel=0.01)
    judgement = conclude_average(average, regimes, STRICT, surroundings_of(slow, ()))
    assert judgement.verdict is PASS
    assert "batches of 1, 4" in judgement.reason
    unsettled = surroundings_of(slow, [WarmUp(traces=(), stationary=False)])
    assert conclude_average(average, regimes, STRICT, unsettled).verdict is INCONCLUSIVE
    # Only one of the two decided it, and its batch says which.
    judgement = conclude(regimes, [*slow, *fast], STRICT)
    assert judgement.verdict is FAIL
    assert judgement.reason.startswith("prefill, batch 1: ")
    assert "batch 4" not in judgement.reason


def test_a_machine_that_becomes_another_one_near_the_end_is_not_judged() -> None:
    """Three times slower in the last rounds, which no spread shows: most rounds are alike."""
    measured = rounds(8, ratio=1.5, noise=0.005) + rounds(5, ratio=1.5, noise=0.005, seed=1, speed=1 / 3)
    regimes = pair(claim=1.33).analyse(measured)
    assert all(result.noise.spread < 0.15 for result in regimes)
    judgement = conclude(regimes, measured, STRICT)
    assert judgement.verdict is INCONCLUSIVE
    assert "drifted by +199%" in judgement.reason
    told = advice(measured, claim=1.33)
    assert "within a factor of 1.5" in told
    assert "--rounds" not in told


def test_a_warm_up_that_never_settled_and_a_busy_machine_are_not_judged() -> None:
    measured = rounds(12, ratio=1.5)
    unsettled = [WarmUp(traces=(), stationary=True), WarmUp(traces=(), stationary=False)]
    regimes = pair(claim=1.33).analyse(measured, unsettled)
    assert [result.verdict for result in regimes] == [INCONCLUSIVE, INCONCLUSIVE]
    assert "did not settle" in conclude(regimes, measured, STRICT).reason
    assert advice(measured, claim=1.33, settled=False).startswith("a warm-up that settles")
    busy = advice(measured, claim=1.33, others=0.6)
    assert "others take 50% at most: end them (they took 60% of it)" in busy
    assert "--rounds" not in busy
    assert advice(measured, claim=1.33, others=0.4) == ""


def test_fixed_memory_counts_requests_and_compares_throughput() -> None:
    tokens = 137
    budget = memory_for(DENSE, requests=8, tokens=tokens, dtype_bytes=2)
    dense = capacity(DENSE, memory_bytes=budget, tokens=tokens, dtype_bytes=2)
    narrow = capacity(NARROW, memory_bytes=budget, tokens=tokens, dtype_bytes=2)
    assert dense.requests == 8
    saved = 2 * (DENSE.parameters - NARROW.parameters)
    assert narrow.requests == 8 + saved // narrow.kv_bytes_per_request
    assert capacity(DENSE, memory_bytes=1000, tokens=tokens, dtype_bytes=2).requests == 0
    # The same step with twice the requests in it is twice the throughput.
    settings = pair(claim=1.33, batch_size=8, fixed_memory=True, regimes=("decode",))
    doubled = dataclasses.replace(settings, candidate_batch=16)
    [result] = doubled.analyse(rounds(12, ratio=1.0, batch_sizes=(8,), candidate_batch=16))
    assert result.ratio.median == pytest.approx(2.0, rel=0.02)
    assert (result.batch_size, result.candidate_batch_size) == (8, 16)
    assert result.ceiling > 2
    # A floor is of what stands beside it: here of a request's share of the step.
    rates = MachineRates(dtype="bfloat16", bytes_per_s=20e9, flops_per_s=100e9)
    [result] = dataclasses.replace(doubled, probes=(rates,)).analyse(
        rounds(12, ratio=1.0, batch_sizes=(8,), candidate_batch=16)
    )
    step_s = Floors(shape=NARROW, rates=rates, dtype_bytes=2).decode_step_s(
        batch_size=16, context_tokens=result.context_tokens
    )
    assert result.candidate_roof is not None
    assert result.candidate_roof.floor_s == pytest.approx(step_s / 16)


def series(monkeypatch: pytest.MonkeyPatch, noise: float, **settings: Any) -> tuple[int, str]:
    """Rounds that a check makes on a machine with this noise, and why it stops."""
    measured = iter(rounds(500, ratio=1.3, noise=noise))
    monkeypatch.setattr(speedup_series, "run_round", lambda *_, **__: next(measured))
    warmed = WarmUp(traces=(trace(ttft_s=0.4, step_s=0.1),), stationary=True)
    chosen = pair(claim=1.33, rounds=6, **settings)
    made, stopped, _ = measure_rounds(None, None, chosen, (warmed, warmed), lambda *_: None)
    return len(made), stopped


def test_rounds_are_added_until_the_interval_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert series(monkeypatch, 0.03) == (6, "6 rounds were asked for")
    made, stopped = series(monkeypatch, 0.03, precision=0.03, max_rounds=200)
    assert 10 < made < 200
    assert "3.0% was asked for" in stopped
    assert series(monkeypatch, 0.001, precision=0.03)[0] == 6
    made, stopped = series(monkeypatch, 0.2, precision=0.01, max_rounds=20)
    assert made == 20
    assert "20 rounds are the bound" in stopped
    made, stopped = series(monkeypatch, 0.2, precision=0.01, max_seconds=1e-9)
    assert made == 6
    assert "were over" in stopped


def test_the_interval_of_a_ratio_is_what_precision_means() -> None:
    ratio = paired_ratio([2.0, 2.2, 1.8, 2.0], [1.0] * 4)
    assert relative_width(ratio) == (ratio.high - ratio.low) / 2.0


def test_regimes_are_named_as_users_name_them() -> None:
    assert [regime.value for regime in Regime] == ["prefill", "decode"]
