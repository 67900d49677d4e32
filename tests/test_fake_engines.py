"""Whole checks on engines of known latency, in processes of their own: from the command's settings to the verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import EngineError
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench import model_source
from pat_serve.server.bench.latency.result import LatencySettings, ThroughputSettings
from pat_serve.server.bench.latency.run import measure_latency, measure_throughput
from pat_serve.server.bench.latency.table import beaten_lines
from pat_serve.server.bench.model_source import ModelSource
from pat_serve.server.bench.report.rows import rows_of
from pat_serve.server.bench.speculative import run as speculative
from pat_serve.server.bench.speculative.result import SpeculativeSettings
from pat_serve.server.bench.speculative.run import measure_speculative
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.table import around_line, floor_lines, memory_lines
from pat_serve.server.engine.workers import process as worker_process
from pat_serve.server.engine.workers.cpu_watch import CpuWatch
from pat_serve.server.engine.workers.probe import MachineRates
from tests.fake_models import Model, check, fake_models, quiet

# They measure real time, which a busy machine stretches.
pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    return fake_models(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("ratio", "disturbance", "verdict"),
    [
        (1.40, {"noise": 0.02}, Verdict.PASS),
        (1.25, {"noise": 0.02}, Verdict.FAIL),
        (1.00, {"noise": 0.02}, Verdict.FAIL),
        # Twice as slow at the end as at the beginning.
        (1.40, {"noise": 0.01, "drift": 0.03}, Verdict.PASS),
        (1.40, {"noise": 0.02, "stalls": (5, 9)}, Verdict.PASS),
        (2.00, {"noise": 0.6}, Verdict.INCONCLUSIVE),
    ],
)
def test_known_latencies_in_known_verdict_out(
    ratio: float, disturbance: dict[str, Any], verdict: Verdict, model: Model
) -> None:
    dense = model("dense", **disturbance)
    narrow = model("narrow", hidden_size=48, prefill_s=0.4 / ratio, step_s=0.1 / ratio, **disturbance)
    result = check(dense, narrow, rounds=16)
    assert result.verdict is verdict, result.reason
    assert [len(result.rounds), result.stopped] == [16, "16 rounds were asked for"]
    assert (result.advice == ()) == (verdict is not Verdict.INCONCLUSIVE)
    if verdict is not Verdict.INCONCLUSIVE:
        for regime in result.regimes:
            assert regime.ratio.median == pytest.approx(ratio, rel=0.03)
    if "stalls" in disturbance:
        assert sum(regime.noise.stalls for regime in result.regimes) >= 4
    if "drift" in disturbance:
        assert all(regime.noise.drift > 0.2 for regime in result.regimes)


def test_a_warm_up_that_never_settles_and_a_busy_machine_give_no_verdict(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, narrow = model("dense"), model("narrow", hidden_size=48, prefill_s=0.2, step_s=0.05)
    # Every other one of the warm-ups takes ten times as long, and no round does.
    jumpy = model("jumpy", hidden_size=48, prefill_s=0.2, step_s=0.05, stalls=(0, 2, 4, 6))
    result = check(dense, jumpy, rounds=5)
    assert (result.baseline.warm_up.stationary, result.candidate.warm_up.stationary) == (True, False)
    assert len(result.candidate.warm_up.traces) == 8
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "did not settle" in result.reason
    assert "candidate NOT settled within 8 runs" in around_line(result)
    assert result.advice
    monkeypatch.setattr(CpuWatch, "other_share", 0.6)
    busy = check(dense, narrow, rounds=5)
    assert busy.verdict is Verdict.INCONCLUSIVE
    assert "other processes took 60% of the CPU time" in busy.reason


def test_both_models_stand_beside_their_floors(model: Model) -> None:
    # The machine is quicker after the rounds, and each engine finds another roof best: the floors take the best of all.
    dense = model("dense", rates=[[0.8e8, 1e10], [0.7e8, 0.9e10]])
    narrow = model("narrow", hidden_size=48, prefill_s=0.2, step_s=0.05, rates=[[0.6e8, 0.5e10], [1e8, 0.6e10]])
    result = check(dense, narrow, rounds=5, roofline=True, dtype="float32")
    assert [probe.bytes_per_s for probe in result.probes] == [0.8e8, 0.6e8, 0.7e8, 1e8]
    assert result.rates == MachineRates(dtype="float32", bytes_per_s=1e8, flops_per_s=1e10, cache_bytes=1)
    for regime in result.regimes:
        rows = [row for row in rows_of(result) if row.where.startswith(regime.name) and row.unit == "s"]
        for side, roof, row in zip(
            (regime.baseline, regime.candidate), (regime.baseline_roof, regime.candidate_roof), rows, strict=True
        ):
            assert roof is not None
            assert roof.reached == pytest.approx(roof.floor_s / side.median)
            assert (row.ceiling, row.reached) == (roof.floor_s, roof.reached)
        [line] = floor_lines(regime)
        assert line.startswith(f"floor   {regime.name}: baseline ")
    # With a machine's two rates, prefill and decode each meet the roof that the ceiling of the ratio is counted by.
    decode = result.regimes[1]
    assert decode.baseline_roof is not None
    assert decode.candidate_roof is not None
    assert decode.baseline_roof.floor_s / decode.candidate_roof.floor_s == pytest.approx(decode.ceiling)
    without = check(dense, narrow, rounds=5)
    assert without.rates is None
    assert floor_lines(without.regimes[0]) == []


def test_a_floor_that_is_beaten_is_none(model: Model) -> None:
    # A decode step of 0.1 s reads some hundred kB: a machine of 1 MB/s would need longer for it.
    slow = [[1e5, 1e10]]
    dense, narrow = model("dense", rates=slow), model("narrow", hidden_size=48, step_s=0.05, rates=slow)
    decode = check(dense, narrow, rounds=5, roofline=True).regimes[1]
    assert decode.baseline_roof is not None
    assert decode.baseline_roof.reached > 1
    assert decode.baseline_roof.share == "beaten"
    [line] = floor_lines(decode)
    assert line.count("has none: the probe was slower than the engine") == 2
    assert "%" not in line
    changed = model("changed", rates=[[1e5, 1e10], [1.2e5, 1e10]])
    found = check(changed, narrow, rounds=5, roofline=True)
    [line] = floor_lines(found.regimes[1])
    assert "the machine changed while it was probed (0.0001 to 0.00012 GB/s)" in line
    assert [row.reached for row in rows_of(found) if row.where.startswith("decode") and row.unit == "s"] == [None, None]
    settings = LatencySettings(
        load_format="dummy", prompt_tokens=(8,), output_tokens=(3,), batch_sizes=(1,), rounds=2, dtype="float32"
    )
    latency = measure_latency(dense, settings, progress=quiet)
    assert len(latency.probes) == 2
    assert latency.cells[0].tpot_roof is not None
    assert latency.cells[0].tpot_roof.share == "beaten"
    assert any(told.startswith("no floor: TPOT of 1 x 8 + 3: the probe was slower") for told in beaten_lines(latency))


def test_memory_on_a_gpu_is_told_apart_from_the_host_s(model: Model) -> None:
    dense, narrow = model("dense", gpu_memory_bytes=3 << 30), model("narrow", hidden_size=48)
    result = check(dense, narrow, rounds=5)
    assert (result.baseline.gpu_memory_bytes, result.candidate.gpu_memory_bytes) == (3 << 30, None)
    lines = memory_lines(result)
    assert "GiB (host), on the GPU 3.00 GiB" in lines[0]
    assert "GPU" not in lines[1]
    assert [row.value for row in rows_of(result) if row.figure == "GPU peak"] == [3 << 30]
    settings = LatencySettings(load_format="dummy", prompt_tokens=(8,), output_tokens=(3,), rounds=2, roofline=False)
    latency = measure_latency(dense, settings, progress=quiet)
    assert latency.gpu_memory_bytes == 3 << 30
    assert [row.value for row in rows_of(latency) if row.figure == "GPU peak"] == [3 << 30]


def test_an_engine_that_worked_on_other_token_ids_is_no_measurement(model: Model) -> None:
    changed = model("changed", hidden_size=48, other_prompts_at=4)
    with pytest.raises(EngineError, match="token ids that it was sent in round 2") as caught:
        check(model("dense"), changed, rounds=5)
    assert "candidate" in caught.value.subject


def test_a_wanted_precision_takes_the_rounds_that_it_needs(model: Model) -> None:
    dense, narrow = model("dense", noise=0.05), model("narrow", hidden_size=48, prefill_s=0.3, step_s=0.075, noise=0.05)
    result = check(dense, narrow, rounds=6, precision=0.04, max_rounds=200)
    assert 8 < len(result.rounds) <= 200
    assert all((one.ratio.high - one.ratio.low) / one.ratio.median <= 0.04 for one in result.regimes)
    assert "was asked for" in result.stopped


def test_the_paper_s_measure_and_equal_memory(model: Model) -> None:
    dense, narrow = model("dense"), model("narrow", hidden_size=48, prefill_s=0.2, step_s=0.1)
    paper = check(dense, narrow, rounds=5, batch_sizes=(1, 2, 4), judge_average=True, regimes=(Regime.PREFILL,))
    assert [regime.batch_size for regime in paper.regimes] == [1, 2, 4]
    assert len(paper.rounds) == 15
    assert paper.average is not None
    assert paper.average.median == pytest.approx(2.0)
    assert paper.verdict is Verdict.PASS
    memory = check(dense, narrow, rounds=5, batch_size=4, fixed_memory=True, regimes=(Regime.DECODE,))
    [regime] = memory.regimes
    assert memory.candidate.capacity is not None
    assert regime.candidate_batch_size == memory.candidate.capacity.requests == memory.candidate.batch_size > 4
    # The steps take as long; more requests share them.
    assert regime.ratio.median == pytest.approx(regime.candidate_batch_size / 4)


@pytest.mark.parametrize(
    ("truth", "message"),
    [({"dies_at": 4}, "exit code 7"), ({"fails_at": 4}, "told to fail"), ({"dies_at": 0}, "exit code 7")],
)
def test_an_engine_that_fails_or_dies_is_named_with_its_log(truth: dict[str, int], message: str, model: Model) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        check(model("dense"), model("narrow", hidden_size=48, **truth))
    assert "candidate" in caught.value.subject
    assert ".log" in caught.value.fix


def test_latency_and_throughput_of_known_engines(model: Model) -> None:
    settings = LatencySettings(
        load_format="dummy", batch_sizes=(1, 2), prompt_tokens=(8,), output_tokens=(1, 5), rounds=3, roofline=False
    )
    latency = measure_latency(model("steady"), settings, progress=quiet)
    assert [(cell.batch_size, cell.output_tokens) for cell in latency.cells] == [(1, 1), (1, 5), (2, 1), (2, 5)]
    for cell in latency.cells:
        assert cell.ttft.p99_9 == pytest.approx(0.4)
        if cell.output_tokens == 1:
            assert cell.tpot is None
        else:
            assert cell.tpot is not None
            assert cell.tpot.p50 == pytest.approx(0.1)
            assert cell.e2e.p50 == pytest.approx(0.8)
    # The more in flight, the more tokens a step: it never saturates.
    load = ThroughputSettings(
        load_format="dummy", concurrencies=(1, 2), max_concurrency=8, prompt_tokens=8, output_tokens=5, roofline=False
    )
    throughput = measure_throughput(model("endless"), load, progress=quiet)
    assert [run.concurrency for run in throughput.runs] == [1, 2, 4, 8]
    assert throughput.saturation is None
    assert [run.output_tokens_per_s for run in throughput.runs] == pytest.approx(
        [5 / 0.8, 10 / 0.8, 20 / 0.8, 40 / 0.8]
    )


@pytest.mark.parametrize("from_the_hub", ["model", "draft"])
def test_an_engine_may_fetch_what_any_of_its_models_lacks(
    from_the_hub: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str, **settings: Any) -> ModelSource:
        source = model_source.resolve(name, **settings)
        return dataclasses.replace(source, on_disk=settings["flag"] != f"--{from_the_hub}")

    offline = {}

    def engine(label: str, **settings: Any) -> worker_process.EngineProcess:
        offline[label] = settings["offline"]
        return worker_process.EngineProcess(label, **settings)

    monkeypatch.setattr(speculative, "resolve", found)
    monkeypatch.setattr(speculative, "EngineProcess", engine)
    settings = SpeculativeSettings(load_format="dummy", draft_tokens=1, output_tokens=5, prompt_tokens=8, rounds=5)
    measure_speculative(model("dense"), model("narrow", hidden_size=48), settings, (), progress=quiet)
    assert offline == {"model": from_the_hub != "model", "model with its draft": False}


def test_a_draft_of_known_acceptance(model: Model) -> None:
    settings = SpeculativeSettings(load_format="dummy", draft_tokens=3, output_tokens=21, prompt_tokens=8, rounds=6)
    dense = model("dense", step_s=0.1, accepted=2, noise=0.01)
    result = measure_speculative(dense, model("narrow", hidden_size=48), settings, (), progress=quiet)
    # The same steps, with three tokens in each instead of one.
    assert result.ratio.median == pytest.approx(20 / 7, rel=0.1)
    assert result.tokens_per_step == pytest.approx(3.0)
    assert result.acceptance == pytest.approx(2 / 3)
    assert result.identical == 6
    changed = model("changed", accepted=2, changes_output=True)
    wrong = measure_speculative(changed, model("other", hidden_size=48), settings, (), progress=quiet)
    assert wrong.identical == 0
