"""The soak's verdicts on figures that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.soak import LEAK_BYTES, MIB, Sample, engine_excess, slope, table, verdicts

REST = Sample(
    at_s=0, requests=0, http_bytes=0, engine_bytes=10**9, descriptors=90, processes=4, threads=70, idle_s=0.1, blocks=0
)


def run(bytes_per_request: float, *, noise_mib: float = 0.5, warmup_mib: float = 100, count: int = 60) -> list[Sample]:
    """A server that grows by its caches first, and then by so much for each request."""
    noise = np.random.default_rng(0).normal(0, noise_mib * MIB, count)
    return [
        replace(
            REST,
            at_s=5.0 * index,
            requests=100 * index,
            http_bytes=int(
                2000 * MIB + bytes_per_request * 100 * index + noise[index] + warmup_mib * MIB * min(1, index / 10)
            ),
        )
        for index in range(count)
    ]


MEMORY = ("memory of the HTTP process", "memory of the engine")
GOOD = dict.fromkeys((*MEMORY, "descriptors", "processes", "threads", "cache blocks"), "no leak")
GOOD |= {"idle in time": "yes"}


def test_a_server_that_gives_all_back() -> None:
    assert verdicts(run(0)) == GOOD
    assert table(run(0)).count("\n") in range(12, 18)


@pytest.mark.parametrize("leak", [2 * LEAK_BYTES, 50_000])
def test_what_is_kept_of_each_request_is_a_leak(leak: float) -> None:
    assert verdicts(run(leak)) == GOOD | {MEMORY[0]: "leak"}


def test_noise_that_hides_a_leak_is_no_verdict() -> None:
    assert verdicts(run(LEAK_BYTES, noise_mib=20))[MEMORY[0]] == "inconclusive"


def test_the_slope_has_its_interval() -> None:
    samples = run(5000)[20:]
    grown = slope([sample.requests for sample in samples], [sample.http_bytes for sample in samples])
    assert grown.low < 5000 < grown.high
    assert grown.median == pytest.approx(5000, rel=0.05)


@pytest.mark.parametrize("name", ["descriptors", "processes", "threads"])
def test_counts(name: str) -> None:
    first = getattr(REST, name)
    breathing = [replace(sample, **{name: first + index % 3}) for index, sample in enumerate(run(0))]
    assert verdicts(breathing) == GOOD
    growing = [replace(sample, **{name: first + index % 3 + index // 8}) for index, sample in enumerate(run(0))]
    assert verdicts(growing) == GOOD | {name: "leak"}


def test_one_pause_with_blocks_held_or_a_slow_end() -> None:
    samples = run(0)
    samples[5] = replace(samples[5], blocks=0.01, idle_s=2.5)
    assert verdicts(samples) == GOOD | {"cache blocks": "leak", "idle in time": "no"}


@pytest.mark.parametrize(
    ("ours", "verdict"), [(3000, "no leak"), (3000 - 2 * LEAK_BYTES, "no leak"), (3000 + 2 * LEAK_BYTES, "leak")]
)
def test_an_engine_is_judged_by_what_it_grows_more_than_in_plain_vllm(ours: float, verdict: str) -> None:
    def engine(bytes_per_action: float, count: int) -> list[Sample]:
        grown = run(bytes_per_action, count=count)
        return [replace(sample, engine_bytes=sample.http_bytes, http_bytes=10**9) for sample in grown]

    # The other run was longer: what it did beyond ours does not count.
    plain = engine(3000, 60) + [replace(one, requests=one.requests + 6000) for one in engine(0, 60)]
    assert verdicts(engine(ours, 60), plain)["memory of the engine, beyond plain vLLM's"] == verdict
    assert engine_excess(engine(ours, 60), plain).median == pytest.approx(ours - 3000, abs=400)
