"""Latency and throughput from made-up timestamps, and the real probe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pat_serve.errors import EngineError, UsageError
from pat_serve.server.analysis.trace import RequestTrace
from pat_serve.server.bench.latency.result import LatencySettings, Roof, ThroughputSettings, distribution
from pat_serve.server.bench.latency.run import measure_latency, measure_throughput
from pat_serve.server.bench.latency.summary import Floors, latency_cell, throughput_run, why_beaten
from pat_serve.server.engine.workers import probe
from pat_serve.server.engine.workers.probe import (
    SIZES,
    MachineRates,
    Product,
    Sizes,
    best_rates,
    gpu_time_s,
    last_level_cache_bytes,
    measure_rates,
)
from pat_serve.shapes.roofline import decode_flops, prefill_bytes, prefill_flops
from pat_serve.shapes.sizes import decode_bytes
from tests.speedup_records import DENSE, trace

RATES = MachineRates(dtype="float32", bytes_per_s=20e9, flops_per_s=100e9)
FLOORS = Floors(shape=DENSE, rates=RATES, dtype_bytes=4)


def test_distribution_reaches_into_the_tail() -> None:
    times = distribution([float(value) for value in range(1, 1002)])
    assert (times.min, times.p50, times.p90, times.p99, times.p99_9, times.max) == (1, 501, 901, 991, 1000, 1001)


def test_a_cell_of_known_timestamps() -> None:
    traces = [trace(ttft_s=0.5, step_s=step_s, batch_size=2, output_tokens=9) for step_s in (0.1, 0.2, 0.3)]
    cell = latency_cell(traces, prompt_tokens=64, output_tokens=9, floors=FLOORS)
    assert cell.ttft.p50 == pytest.approx(0.5)
    assert cell.tpot is not None
    assert cell.itl is not None
    assert (cell.tpot.count, cell.itl.count) == (3, 24)
    assert cell.tpot.p50 == pytest.approx(0.2)
    assert cell.e2e.p50 == pytest.approx(0.5 + 8 * 0.2)
    assert cell.tpot_roof is not None
    floor_s = FLOORS.decode_step_s(batch_size=2, context_tokens=64 + 4.5)
    assert cell.tpot_roof.floor_s == floor_s
    assert cell.tpot_roof.reached == pytest.approx(floor_s / 0.2)


def test_one_token_has_no_time_between_tokens_and_no_rates_no_ceiling() -> None:
    traces = [trace(ttft_s=0.5, step_s=0.1, output_tokens=1)]
    cell = latency_cell(traces, prompt_tokens=64, output_tokens=1, floors=None)
    assert cell.tpot is cell.itl is cell.ttft_roof is cell.tpot_roof is None
    assert cell.e2e == cell.ttft


def test_the_floor_is_the_roof_that_is_met_first() -> None:
    # One request's step reads everything for a few operations; a long prefill reuses what it has read.
    step_s = FLOORS.decode_step_s(batch_size=1, context_tokens=64)
    assert step_s == decode_bytes(DENSE, batch_size=1, context_tokens=64, dtype_bytes=4) / 20e9
    prompt_s = FLOORS.prefill_s(batch_size=4, prompt_tokens=128)
    assert prompt_s == prefill_flops(DENSE, batch_size=4, prompt_tokens=128) / 100e9
    many = decode_flops(DENSE, batch_size=256, context_tokens=64)
    assert FLOORS.decode_step_s(batch_size=256, context_tokens=64) == many / 100e9
    assert prefill_bytes(DENSE, batch_size=1, prompt_tokens=1, dtype_bytes=4) > 4 * DENSE.layers * DENSE.layer_weights


def test_throughput_of_known_timestamps() -> None:
    # Two in flight, each 4 tokens: 0.5 s to the first and 0.1 s to each other; then two more.
    requests = [
        RequestTrace(submitted_s=begun, tokens_s=tuple(begun + 0.5 + 0.1 * index for index in range(4)))
        for begun in (0.0, 0.0, 0.8, 0.8)
    ]
    settings = ThroughputSettings(prompt_tokens=64, output_tokens=4)
    run = throughput_run(requests, concurrency=2, settings=settings, floors=FLOORS)
    assert run.duration_s == pytest.approx(1.6)
    assert run.output_tokens_per_s == pytest.approx(16 / 1.6)
    assert run.requests_per_s == pytest.approx(4 / 1.6)
    assert run.ttft.p50 == pytest.approx(0.5)
    assert run.tpot is not None
    assert run.tpot.p50 == pytest.approx(0.1)
    wave_s = FLOORS.prefill_s(batch_size=2, prompt_tokens=64) + 3 * FLOORS.decode_step_s(
        batch_size=2, context_tokens=66
    )
    assert run.roof_tokens_per_s == pytest.approx(8 / wave_s)


@pytest.mark.parametrize("flag", ["--prompt-tokens", "--output-tokens", "--waves", "--concurrency"])
def test_a_throughput_of_nothing_is_refused_in_one_line(flag: str) -> None:
    command = [sys.executable, "-m", "pat_serve.cli.bench", "throughput", "--model", "llama2-7b", flag, "0"]
    done = subprocess.run([*command, "--load-format", "dummy"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert flag in line


def test_lengths_of_nothing_have_no_latency() -> None:
    for change in ({"prompt_tokens": (0,)}, {"output_tokens": (0,)}):
        with pytest.raises(UsageError, match="at least 1"):
            measure_latency("llama2-7b", LatencySettings.model_validate(change), progress=lambda *_: None)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="--rounds"):
        measure_latency("llama2-7b", LatencySettings(rounds=0), progress=lambda *_: None)
    settings = LatencySettings(load_format="dummy", prompt_tokens=(4090,))
    with pytest.raises(UsageError, match="at most 4096"):
        measure_latency("llama2-7b", settings, progress=lambda *_: None)
    with pytest.raises(UsageError, match="at least"):
        measure_latency(
            "llama2-7b",
            LatencySettings(batch_sizes=(64,), prompt_tokens=(2048,), output_tokens=(3,)),
            progress=lambda *_: None,
        )
    huge = ThroughputSettings(load_format="dummy", concurrencies=(4096,), prompt_tokens=2048, output_tokens=2048)
    with pytest.raises(EngineError, match="GiB available"):
        measure_throughput("llama2-7b", huge, progress=lambda *_: None)


@pytest.mark.slow
def test_a_gpu_is_timed_by_its_own_clock_over_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose clock moves by 3 ms a call, and by 50 more wherever the host waits for it."""
    clock_ms, waits = [0.0], [0]

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = clock_ms[0]

        def synchronize(self) -> None:
            waits[0] += 1
            clock_ms[0] += 50

        def elapsed_time(self, later: Event) -> float:
            return later.at_ms - self.at_ms

    def work() -> None:
        clock_ms[0] += 3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert gpu_time_s(work, 20) == pytest.approx(0.003)
    assert waits == [1]
    assert SIZES["cuda"].weight_bytes >= 2 << 30
    assert SIZES["cuda"].calls > 10


def test_the_probe_multiplies_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = torch.nn.functional.linear

    def linear(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.extend((row, weight))
        return real(row, weight)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(probe, "_SECONDS", 0.0)
    rates = measure_rates("float32", sizes=Sizes(weight_bytes=1 << 20, square=64, calls=2))
    assert rates.bytes_per_s > 0
    assert rates.flops_per_s > 0
    assert seen[1].numel() * 4 == 1 << 20
    assert all(0.4 < float(tensor.std()) < 0.7 for tensor in seen)


def test_the_probe_of_this_machine() -> None:
    rates = measure_rates("float32", sizes=Sizes(weight_bytes=1 << 26, square=512, calls=1))
    # Any machine that runs this reads 0.5 GB/s and multiplies 1 GFLOP/s; none reads 100 TB/s.
    assert 1e8 < rates.bytes_per_s < 1e14
    assert 1e8 < rates.flops_per_s < 1e17


def test_the_probe_takes_the_engine_s_own_matrices_where_they_are_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that costs nothing stands for a kernel that beats the probe's own."""
    monkeypatch.setattr(probe, "_SECONDS", 0.0)
    seen: list[tuple[int, ...]] = []
    sizes = Sizes(weight_bytes=1 << 20, square=64, calls=1)
    own = [
        Product(columns=columns, weights=10**12, run=lambda rows: seen.append(tuple(rows.shape))) for columns in (8, 16)
    ]
    plain, quick = measure_rates("float32", sizes=sizes), measure_rates("float32", products=own, rows=5, sizes=sizes)
    assert set(seen) == {(1, 8), (1, 16), (5, 8), (5, 16)}
    assert (plain.own_weights, quick.own_weights) == (0, 2 * 10**12)
    assert quick.bytes_per_s > 1e15 > plain.bytes_per_s
    assert quick.flops_per_s > 1e15 > plain.flops_per_s


def test_the_best_of_several_probes_counts() -> None:
    slow, quick = (
        MachineRates(dtype="float32", bytes_per_s=a, flops_per_s=b, cache_bytes=7) for a, b in ((1, 4), (2, 3))
    )
    assert best_rates([slow, quick]) == MachineRates(dtype="float32", bytes_per_s=2, flops_per_s=4, cache_bytes=7)
    assert best_rates([]) is None


def test_the_last_level_cache_is_the_largest_that_the_system_tells_of(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(str(tmp_path)) == 32 << 20
    assert last_level_cache_bytes(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("reached", "rates", "read_bytes", "told"),
    [
        (0.97, (2e10,), 1e9, None),
        (1.0, (2e10,), 1e9, None),
        (1.46, (2e10, 2e10), 1e9, "the probe was slower than the engine"),
        (1.46, (2e10, 3e10), 1e9, "the machine changed while it was probed (20 to 30 GB/s)"),
        (1.46, (2e10, 3e10), 1e6, "1.0 MiB, stays in the cache of 32 MiB"),
        (1.46, (2e10, 3e10), None, "(40 to 60 GFLOP/s)"),
    ],
)
def test_a_floor_that_is_beaten_says_what_was_wrong(
    reached: float, rates: tuple[float, ...], read_bytes: float | None, told: str | None
) -> None:
    probes = [
        MachineRates(dtype="float32", bytes_per_s=one, flops_per_s=2 * one, cache_bytes=32 << 20) for one in rates
    ]
    found = why_beaten(reached, probes, read_bytes=read_bytes)
    assert found is None if told is None else (found is not None and told in found)
    roof = Roof(floor_s=1.0, reached=reached, beaten_by=found)
    assert roof.share == ("beaten" if told else f"{reached:.0%}")
