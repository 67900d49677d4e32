"""The least number of engines that meets an SLO. Pure mathematics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pat_serve.server.bench.planning.simulation import Dispatch, Engine, Timing, simulate, simulate_closed
from pat_serve.server.bench.planning.traffic import Arrival, Mix, poisson

# The first and the last tenth of the simulated requests are left out, because the engines start and end empty.
EDGE = 0.1


class Outcome(StrEnum):
    """The outcome of a search."""

    MET = "met"
    IMPOSSIBLE = "impossible"
    BEYOND = "beyond"


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The traffic to be served, and how well.

    Attributes:
        mix: kinds of requests.
        rate_per_s: of all engines together.
        slo: seconds by name: ttft, tpot, e2e.
        share: share of the requests that must meet all bounds, in (0, 1].
        requests: requests in each simulation.
        seeds: one simulation for each; the SLO must be met in all.
        dispatch: the rule by which requests come to engines.
    """

    mix: Mix
    rate_per_s: float
    slo: Mapping[str, float]
    share: float
    requests: int
    seeds: tuple[int, ...]
    dispatch: Dispatch


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The simulations of one number of engines.

    Attributes:
        replicas: number of engines.
        good_shares: share of the requests within all bounds, for each seed.
        timings: of all seeds together, without the edges.
    """

    replicas: int
    good_shares: tuple[float, ...]
    timings: tuple[Timing, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search.

    Attributes:
        outcome: whether some number of engines meets the SLO.
        capacity_per_s: requests a second of one engine that always has a full batch waiting.
        idle_share: of requests that meet all bounds on an engine of their own: no number of engines gives more.
        trials: all trials, fewest engines first.
        chosen: the trial with the fewest engines that meets the SLO; None without one.
    """

    outcome: Outcome
    capacity_per_s: float
    idle_share: float
    trials: tuple[Trial, ...]
    chosen: Trial | None


def good(timing: Timing, slo: Mapping[str, float]) -> bool:
    """Whether a request met all bounds; a single token has no time between tokens."""
    latencies_s = timing.latencies_s
    return all(latencies_s.get(name, 0.0) <= bound_s for name, bound_s in slo.items())


def capacity_per_s(engine: Engine, mix: Mix, *, requests: int, seed: int) -> float:
    """Requests a second of an engine with twice its batch always in flight, between the first and last tenth."""
    kinds = poisson(mix, rate_per_s=1.0, requests=requests, seed=seed)
    ends_s = sorted(one.last_token_s for one in simulate_closed(kinds, engine, concurrency=2 * engine.max_batch))
    low, high = int(len(ends_s) * EDGE), int(len(ends_s) * (1 - EDGE)) - 1
    return (high - low) / (ends_s[high] - ends_s[low]) if ends_s[high] > ends_s[low] else len(ends_s) / ends_s[-1]


def idle_timing(engine: Engine, *, prompt_tokens: int, output_tokens: int) -> Timing:
    """The times of a request that has an engine to itself."""
    alone = Arrival(at_s=0.0, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    return simulate([alone], engine, replicas=1, dispatch="round-robin")[0]


def trial(engine: Engine, traffic: Traffic, *, replicas: int) -> Trial:
    """Simulate one number of engines with every seed."""
    shares, timings = [], []
    for seed in traffic.seeds:
        arrivals = poisson(traffic.mix, rate_per_s=traffic.rate_per_s, requests=traffic.requests, seed=seed)
        served = simulate(arrivals, engine, replicas=replicas, dispatch=traffic.dispatch)
        kept = served[int(len(served) * EDGE) : max(1, int(len(served) * (1 - EDGE)))]
        shares.append(sum(good(one, traffic.slo) for one in kept) / len(kept))
        timings += kept
    return Trial(replicas=replicas, good_shares=tuple(shares), timings=tuple(timings))


def find_replicas(
    engine: Engine, traffic: Traffic, *, max_replicas: int, progress: Callable[[int], None] = lambda _: None
) -> Found:
    """Double until the SLO is met in every seed, then halve the interval.

    A number of engines that cannot carry the rate at all is not tried, because a finite simulation may not show it. The
    search begins with more engines than the rate over one engine's capacity.

    Args:
        engine: every one of the engines.
        traffic: what is to be served.
        max_replicas: the most engines that are tried.
        progress: called with each number that is about to be tried.
    """
    capacity = capacity_per_s(engine, traffic.mix, requests=traffic.requests, seed=traffic.seeds[0])
    mix = traffic.mix
    idle_share = sum(
        weight
        for prompt, output, weight in zip(mix.prompt_tokens, mix.output_tokens, mix.weights, strict=True)
        if good(idle_timing(engine, prompt_tokens=prompt, output_tokens=output), traffic.slo)
    )
    trials: dict[int, Trial] = {}

    def met(replicas: int) -> bool:
        if replicas not in trials:
            progress(replicas)
            trials[replicas] = trial(engine, traffic, replicas=replicas)
        return min(trials[replicas].good_shares) >= traffic.share

    def found(outcome: Outcome, chosen: int | None) -> Found:
        return Found(
            outcome=outcome,
            capacity_per_s=capacity,
            idle_share=idle_share,
            trials=tuple(trials[replicas] for replicas in sorted(trials)),
            chosen=trials[chosen] if chosen is not None else None,
        )

    if idle_share < traffic.share - 1e-9:
        return found(Outcome.IMPOSSIBLE, None)
    least = int(traffic.rate_per_s / capacity) + 1
    if least > max_replicas:
        return found(Outcome.BEYOND, None)
    low, high = least - 1, least
    while not met(high):
        if high == max_replicas:
            return found(Outcome.BEYOND, None)
        low, high = high, min(2 * high, max_replicas)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return found(Outcome.MET, high)


def quantities(timings: Sequence[Timing], name: str) -> list[float]:
    """One latency in seconds, of all requests that have it."""
    return [times[name] for one in timings if name in (times := one.latencies_s)]
