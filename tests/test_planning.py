"""Capacity planning: the simulation against closed formulas and by hand, the search, and pat-bench plan."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pat_serve.errors import UsageError
from pat_serve.server.bench.planning.search import Outcome, Traffic, capacity_per_s, find_replicas, idle_timing, trial
from pat_serve.server.bench.planning.simulation import Dispatch, Engine, Timing, simulate, simulate_closed
from pat_serve.server.bench.planning.steps import MeasuredCell, StepTimes
from pat_serve.server.bench.planning.traffic import Arrival, Mix, crossed, poisson

FIXED = 0.02


def cells(
    *, batches: tuple[int, ...] = (1, 2, 4), prompts: tuple[int, ...] = (100,), outputs: tuple[int, ...] = (10,)
) -> list[MeasuredCell]:
    """An engine whose step costs 20 ms, 1 ms a prompt token, 1 ms a request and 10 us a token of its context."""
    return [
        MeasuredCell(
            batch_size=batch,
            prompt_tokens=prompt,
            output_tokens=output,
            prefill_s=FIXED + 0.001 * batch * prompt,
            step_s=FIXED + batch * (0.001 + 1e-5 * (prompt + output / 2)) if output > 1 else None,
        )
        for batch in batches
        for prompt in prompts
        for output in outputs
    ]


def engine(max_batch: int = 4, kv_tokens: int | None = None, max_step_tokens: int = 2048, **grid: Any) -> Engine:
    times = StepTimes(cells(**grid), name="made-up")
    return Engine(times=times, max_batch=max_batch, max_step_tokens=max_step_tokens, kv_tokens=kv_tokens)


def arrivals(*rows: tuple[float, int, int]) -> list[Arrival]:
    return [Arrival(at_s=at_s, prompt_tokens=prompt, output_tokens=output) for at_s, prompt, output in rows]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def mean_wait_s(served: list[Timing], service_s: float) -> float:
    return mean([one.latencies_s["e2e"] for one in served]) - service_s


def test_a_known_case_by_hand() -> None:
    """Two requests on one engine: the second's prompt shares a step with the first's second token."""
    first, second = simulate(
        arrivals((0.0, 100, 3), (0.05, 100, 2)), engine(outputs=(10,)), replicas=1, dispatch="least-loaded"
    )
    prefill_s, alone_s, both_s = 0.12, FIXED + 0.001 + 105e-5, FIXED + 2 * (0.001 + 105e-5)
    # The step's fixed part is paid once; of a decode step of one nothing else is counted as the batch's.
    mixed_s = prefill_s
    assert first.first_token_s == pytest.approx(prefill_s)
    assert second.first_token_s == pytest.approx(prefill_s + mixed_s)
    assert first.last_token_s == second.last_token_s == pytest.approx(prefill_s + mixed_s + both_s)
    assert first.latencies_s["tpot"] == pytest.approx((mixed_s + both_s) / 2)
    assert second.latencies_s["ttft"] == pytest.approx(prefill_s + mixed_s - 0.05)
    assert idle_timing(engine(), prompt_tokens=100, output_tokens=2).last_token_s == pytest.approx(prefill_s + alone_s)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.85])
def test_one_at_a_time_is_m_d_1(load: float) -> None:
    """Batch 1, one token: a single server of constant service time S waits rho S / 2 (1 - rho) on average."""
    one, service_s = engine(max_batch=1), 0.12
    traffic = poisson(crossed([(100, 1)], [(1, 1)]), rate_per_s=load / service_s, requests=40_000, seed=1)
    served = simulate(traffic, one, replicas=1, dispatch="round-robin")
    assert mean_wait_s(served, service_s) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.06)


def test_mixed_lengths_are_m_g_1() -> None:
    """Pollaczek and Khinchine: the wait grows with the second moment of the service time."""
    one = engine(max_batch=1, prompts=(100, 300))
    mix, service = crossed([(100, 0.8), (300, 0.2)], [(1, 1)]), ((0.12, 0.8), (0.32, 0.2))
    first = sum(weight * s for s, weight in service)
    second = sum(weight * s * s for s, weight in service)
    rate = 0.6 / first
    served = simulate(poisson(mix, rate_per_s=rate, requests=40_000, seed=3), one, replicas=1, dispatch="round-robin")
    assert mean_wait_s(served, first) == pytest.approx(rate * second / (2 * (1 - 0.6)), rel=0.06)


def test_in_turn_to_two_equal_engines_is_m_d_2() -> None:
    """Where service times are constant, turns are first come first served at two servers; counting is a bit worse."""
    one, free_s, waits_s = engine(max_batch=1), [0.0, 0.0], []
    traffic = poisson(crossed([(100, 1)], [(1, 1)]), rate_per_s=1.6 / 0.12, requests=20_000, seed=2)
    for arrival in traffic:
        begun_s = max(arrival.at_s, min(free_s))
        free_s[free_s.index(min(free_s))] = begun_s + 0.12
        waits_s.append(begun_s - arrival.at_s)
    served = simulate(traffic, one, replicas=2, dispatch="round-robin")
    assert [each.latencies_s["e2e"] for each in served] == pytest.approx([wait_s + 0.12 for wait_s in waits_s])
    counted = simulate(traffic, one, replicas=2, dispatch="least-loaded")
    assert mean(waits_s) < mean_wait_s(counted, 0.12) < 1.2 * mean(waits_s)


def test_with_long_and_short_requests_the_least_loaded_engine_is_the_better_choice() -> None:
    traffic = poisson(crossed([(100, 0.9), (1500, 0.1)], [(1, 1)]), rate_per_s=5.0, requests=10_000, seed=2)
    one = engine(max_batch=1, prompts=(100, 1500))
    waits_s = [
        mean_wait_s(simulate(traffic, one, replicas=2, dispatch=dispatch), 0.0)
        for dispatch in ("least-loaded", "round-robin")
    ]
    assert waits_s[0] < 0.8 * waits_s[1]


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    mix = crossed([(100, 1), (200, 2)], [(1, 1), (5, 1)])
    assert poisson(mix, rate_per_s=3, requests=50, seed=7) == poisson(mix, rate_per_s=3, requests=50, seed=7)
    assert poisson(mix, rate_per_s=3, requests=50, seed=7) != poisson(mix, rate_per_s=3, requests=50, seed=8)
    slow, fast = (poisson(mix, rate_per_s=rate, requests=50, seed=7) for rate in (1, 10))
    assert [one.at_s for one in slow] == pytest.approx([10 * one.at_s for one in fast])
    assert [one.prompt_tokens for one in slow] == [one.prompt_tokens for one in fast]
    many = poisson(mix, rate_per_s=3, requests=20_000, seed=0)
    assert many[-1].at_s == pytest.approx(20_000 / 3, rel=0.03)
    assert mean([one.prompt_tokens for one in many]) == pytest.approx(500 / 3, rel=0.02)


def test_bounds_hold_requests_back() -> None:
    together = arrivals(*[(0.0, 100, 4)] * 4)

    def first_tokens(**bounds: int) -> list[float]:
        served = simulate(together, engine(**bounds), replicas=1, dispatch="least-loaded")
        return [round(one.first_token_s, 6) for one in served]

    assert len(set(first_tokens())) == 1
    # Room for two: the others wait until these are done, not for the next step.
    assert first_tokens(max_batch=2) == first_tokens(kv_tokens=208)
    assert len(set(first_tokens(max_batch=2))) == 2
    # Two prompts a step: the others' come in the very next one.
    halves = first_tokens(max_step_tokens=200)
    assert halves[2] == pytest.approx(halves[0] + 0.22 + (FIXED + 2 * 205e-5) - (FIXED + 205e-5))
    assert halves[2] < first_tokens(max_batch=2)[2]


def test_a_full_engine_s_capacity() -> None:
    """One token each, four prompts a step: four requests in 0.42 s."""
    assert capacity_per_s(engine(), crossed([(100, 1)], [(1, 1)]), requests=1000, seed=0) == pytest.approx(
        4 / 0.42, rel=0.02
    )
    served = simulate_closed(arrivals(*[(0.0, 100, 1)] * 3), engine(), concurrency=1)
    assert [one.last_token_s for one in served] == pytest.approx([0.12, 0.24, 0.36])


def traffic(rate_per_s: float, *, dispatch: Dispatch = "least-loaded", **slo: float) -> Traffic:
    mix: Mix = crossed([(100, 1)], [(10, 1)])
    return Traffic(mix=mix, rate_per_s=rate_per_s, slo=slo, share=0.9, requests=600, seeds=(0, 1), dispatch=dispatch)


@pytest.mark.parametrize("dispatch", ["least-loaded", "round-robin"])
def test_more_engines_serve_more_and_the_least_is_found(dispatch: Dispatch) -> None:
    wanted = traffic(30.0, dispatch=dispatch, ttft=0.3)
    shares = [min(trial(engine(), wanted, replicas=count).good_shares) for count in range(4, 13)]
    assert shares == sorted(shares)
    assert shares[0] < 0.9 < shares[-1]
    found = find_replicas(engine(), wanted, max_replicas=64)
    assert found.outcome is Outcome.MET
    assert found.chosen is not None
    assert found.chosen.replicas == 4 + next(index for index, share in enumerate(shares) if share >= 0.9)
    assert found.chosen.replicas > 30.0 / found.capacity_per_s


def test_a_slow_slo_still_needs_engines_that_carry_the_rate() -> None:
    """600 requests would all be done within an hour by one engine; more and more of them would wait for ever."""
    found = find_replicas(engine(), traffic(30.0, e2e=3600.0), max_replicas=64)
    assert found.chosen is not None
    assert found.chosen.replicas == math.ceil(30.0 / found.capacity_per_s)


def test_what_no_number_of_engines_gives_and_what_too_few_do() -> None:
    assert find_replicas(engine(), traffic(1.0, ttft=0.1), max_replicas=64).outcome is Outcome.IMPOSSIBLE
    for most in (1, 5):
        assert find_replicas(engine(), traffic(30.0, ttft=0.13), max_replicas=most).outcome is Outcome.BEYOND


def test_steps_between_the_measured_ones() -> None:
    times = StepTimes(cells(batches=(1, 4), prompts=(100, 300)), name="made-up")
    assert times.prefill_s(2, 200) == pytest.approx(FIXED + 0.001 * 2 * 200)
    assert times.decode_s(3, 205) == pytest.approx(FIXED + 3 * (0.001 + 205e-5))
    together = times.step_s(prompts=1, prompt_tokens=100, decoding=4, context_tokens=105)
    assert together == pytest.approx(0.12 + 3 * 205e-5)
    assert times.step_s(prompts=0, prompt_tokens=0, decoding=1, context_tokens=105) == times.decode_s(1, 105)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "batch 1 among them"),
        (cells(batches=(2, 4)), "batch 1 among them"),
        (cells(batches=(1, 4)) + cells(batches=(1,), prompts=(200,)), "batch 4, prompt 200"),
        (cells(batches=(1,)) + cells(batches=(4,), outputs=(1,)), "decode at 1"),
    ],
)
def test_a_grid_with_holes_is_refused(grid: list[MeasuredCell], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StepTimes(grid, name="made-up")
