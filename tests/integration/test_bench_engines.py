"""The tester tested on real engines: a model against itself, a slowed candidate, drafts, latency and throughput."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pat_serve.server.analysis.verdict import Verdict, obstacles
from pat_serve.server.bench.latency.result import LatencySettings, ThroughputSettings
from pat_serve.server.bench.latency.run import measure_latency, measure_throughput
from pat_serve.server.bench.load.result import LoadSettings
from pat_serve.server.bench.load.run import run_load
from pat_serve.server.bench.speculative.result import SpeculativeSettings
from pat_serve.server.bench.speculative.run import measure_speculative
from pat_serve.server.bench.speedup import series as speedup_series
from pat_serve.server.bench.speedup.analysis import surroundings_of
from pat_serve.server.bench.speedup.check import check_speedup
from pat_serve.server.bench.speedup.grid import Cell, Named, Regime
from pat_serve.server.bench.speedup.result import RegimeResult, SpeedupResult
from pat_serve.server.bench.speedup.rounds import run_round
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.tokens.prompts import asked
from tests.integration.conftest import HANG_S, KEY, Server, running
from tests.tiny_models import save_tiny_llama, tiny_config

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def quiet(*_: Any) -> None:
    """Show no progress at all in these tests."""


def shape_folder(folder: Path, **overrides: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(**overrides).to_dict()))
    return str(folder)


# Large enough that a step is its matrices and not the engine's own Python, small enough for a test.
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16}


def refused(result: SpeedupResult, regime: RegimeResult) -> bool:
    """Nothing was said of it, since the machine was busy."""
    surroundings = surroundings_of(result.rounds, [result.baseline.warm_up, result.candidate.warm_up])
    noise, rounds = regime.noise, len(regime.ratio.ratios)
    return bool(obstacles(rounds=rounds, spread=noise.spread, drift=noise.drift, surroundings=surroundings))


def test_a_model_against_itself_shows_no_difference(tmp_path: Path) -> None:
    model = shape_folder(tmp_path / "model", **SHAPE)
    settings = SpeedupSettings(
        load_format="dummy", rounds=12, prompt_tokens=64, precision=0.1, max_rounds=40, max_seconds=120
    )
    result = check_speedup(model, model, settings, progress=quiet)
    assert result.verdict is not Verdict.PASS
    for regime in result.regimes:
        assert regime.ceiling == 1.0
        assert regime.verdict is Verdict.FAIL or refused(result, regime) or regime.ratio.high >= 1.33
        # Wide, since a 95 % interval misses once in twenty and the test may not.
        assert regime.ratio.low < 1.05
        assert regime.ratio.high > 0.95
    assert result.baseline.capacity == result.candidate.capacity


@contextmanager
def held_back(pid: int, share: float) -> Iterator[None]:
    """Stop a process for this share of the time, in slices shorter than a step."""
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.01 * share)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01 * (1 - share))

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_narrower_candidate_that_is_slowed_down_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter narrower, with a ceiling near 1.33, but held back for half of the time: no pass, whatever else."""
    dense = shape_folder(tmp_path / "dense", **SHAPE)
    narrow = shape_folder(tmp_path / "narrow", **{**SHAPE, "hidden_size": 768, "head_dim": 32})

    def slowed(baseline: Any, candidate: Any, *arguments: Any, **options: Any) -> Any:
        with held_back(candidate.pid, 0.5):
            return run_round(baseline, candidate, *arguments, **options)

    monkeypatch.setattr(speedup_series, "run_round", slowed)
    settings = SpeedupSettings(load_format="dummy", rounds=12, prompt_tokens=64)
    result = check_speedup(dense, narrow, settings, progress=quiet)
    assert all(regime.ratio.median < 1.1 for regime in result.regimes)
    assert result.verdict is Verdict.FAIL or any(refused(result, regime) for regime in result.regimes)


@pytest.mark.slow
def test_one_pair_of_engines_measures_a_grid(tmp_path: Path) -> None:
    """A wide batch of short prompts and one long prompt: the engines hold both, and each is judged by itself."""
    model = shape_folder(tmp_path / "model", max_position_embeddings=512)
    cells = (Cell(batch_size=4, prompt_tokens=16), Cell(batch_size=1, prompt_tokens=300))
    named = (Named(cell=cells[1], regime=Regime.DECODE),)
    settings = SpeedupSettings(load_format="dummy", rounds=5, grid=cells, named=named, output_tokens=5, roofline=False)
    result = check_speedup(model, model, settings, progress=quiet)
    assert [one.name for one in result.regimes] == [f"{phase}, {cell}" for cell in cells for phase in Regime]
    assert [one.claimed for one in result.regimes] == [False, False, False, True]
    assert result.verdict is result.regimes[-1].verdict
    for one in result.rounds:
        for trace in (one.baseline, one.candidate):
            assert trace.steps_tokens == (trace.batch_size,) * 5
    assert [one.baseline.prompt_tokens for one in result.rounds[:4]] == [16, 300, 300, 16]


def test_latency_and_throughput_of_a_real_engine(tmp_path: Path) -> None:
    model = shape_folder(tmp_path / "model")
    grid = LatencySettings(
        load_format="dummy", batch_sizes=(1, 3), prompt_tokens=(16, 40), output_tokens=(6,), rounds=4
    )
    latency = measure_latency(model, grid, progress=quiet)
    assert [(cell.batch_size, cell.prompt_tokens) for cell in latency.cells] == [(1, 16), (1, 40), (3, 16), (3, 40)]
    for cell in latency.cells:
        assert cell.itl is not None
        assert cell.itl.count == 4 * 5
        assert cell.ttft.p50 < cell.e2e.p50
        # Bytes and FLOPs are a floor: nothing is faster, or the cell says what was wrong with it.
        for roof in (cell.tpot_roof, cell.ttft_roof):
            assert roof is not None
            assert roof.reached > 0
            assert (roof.reached > 1) is (roof.beaten_by is not None)
    assert latency.rates is not None
    # Before and after, by the engine's own kernels: all matrices of its layers, and the output head.
    shape = latency.shape
    weights = shape.layers * shape.layer_weights + shape.head_weights
    assert [probe.own_weights for probe in latency.probes] == [weights, weights]
    load = ThroughputSettings(
        load_format="dummy", concurrencies=(1, 3), max_concurrency=6, prompt_tokens=16, output_tokens=5, roofline=False
    )
    throughput = measure_throughput(model, load, progress=quiet)
    assert [run.concurrency for run in throughput.runs] == [1, 3, 6]
    for run in throughput.runs:
        assert len(run.requests) == 3 * run.concurrency
        assert all(len(request.tokens_s) == 5 for request in run.requests)
        # Never more in flight than asked for.
        events = sorted(
            [(one.submitted_s, 1) for one in run.requests] + [(one.tokens_s[-1], -1) for one in run.requests]
        )
        in_flight = most = 0
        for _, change in events:
            in_flight += change
            most = max(most, in_flight)
        assert most == run.concurrency


def test_a_draft_changes_nothing_but_the_time(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    narrow = save_tiny_llama(tmp_path / "narrow", seed=1, hidden_size=48)
    settings = SpeculativeSettings(draft_tokens=3, output_tokens=24, prompt_tokens=16, rounds=6)
    # A model that drafts for itself proposes what it would choose: all is accepted.
    itself = measure_speculative(str(dense), str(dense), settings, (), progress=quiet)
    assert itself.identical == 6
    assert itself.acceptance > 0.95
    # A stranger's proposals are mostly refused, and the output is the dense model's all the same.
    texts = asked(["The quick brown fox", "Once upon a time", "def main():"])
    other = measure_speculative(str(dense), str(narrow), settings, texts, progress=quiet)
    assert other.identical == 6
    assert other.acceptance < 0.5


def test_the_server_answers_with_a_draft_as_without(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    narrow = save_tiny_llama(tmp_path / "narrow", seed=1, hidden_size=48)
    answers = []
    for name, flags in (("plain", ()), ("drafted", ("--draft", str(narrow), "--draft-tokens", "3"))):
        engine = ["--dtype", "float32", "--kv-cache-gib", "0.25"]
        with running(dense, tmp_path / f"{name}.log", *engine, *flags) as server:
            bodies = [
                {"prompt": prompt, "max_tokens": 32, "temperature": 0} for prompt in ("Hello", "Return a list of", "x")
            ]
            url = f"{server.url}/generate"
            answers.append([httpx.post(url, json=body, timeout=HANG_S).json()["text"] for body in bodies])
    assert answers[0] == answers[1]
    assert all(answers[0])


def test_guidellm_loads_a_real_server(server: Server) -> None:
    """Model name and tokenizer from /v1/models, the key in a file, exact output lengths."""
    settings = LoadSettings(url=server.url, rates=(2.0,), seconds=8, prompt_tokens=24, output_tokens=8, slo={"e2e": 60})
    result = run_load(settings, api_key=KEY)
    [run] = result.runs
    assert result.tokenizer == str(server.model)
    assert run.errored == 0
    assert run.completed >= 5
    assert all(one.output_tokens == 8 for one in run.requests if one.outcome == "completed")
    assert run.good_share == 1.0
