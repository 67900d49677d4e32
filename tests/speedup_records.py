"""Made-up measurements with a known truth: what the statistics and reports are tested on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pat_serve.server.analysis.capacity import capacity, memory_for
from pat_serve.server.analysis.trace import BatchTrace, RequestTrace
from pat_serve.server.bench.latency.result import LatencyResult, LatencySettings, ThroughputResult, ThroughputSettings
from pat_serve.server.bench.latency.summary import Floors, latency_cell, throughput_run
from pat_serve.server.bench.load.result import LoadRequest, LoadResult, LoadSettings, load_run
from pat_serve.server.bench.speedup.analysis import conclude
from pat_serve.server.bench.speedup.depths import conclude_extrapolated, extrapolate_all
from pat_serve.server.bench.speedup.grid import Cell, Regime
from pat_serve.server.bench.speedup.result import DepthMeasurement, ModelRecord, Round, SpeedupResult, WarmUp
from pat_serve.server.bench.speedup.series import Pair
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.workers.probe import MachineRates
from pat_serve.shapes.sizes import ModelSizes

DENSE = ModelSizes(
    hidden=4096, layers=2, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000, tied=False,
)  # fmt: skip
NARROW = replace(DENSE, hidden=3072)


def trace(
    *,
    ttft_s: float,
    step_s: float,
    batch_size: int = 1,
    output_tokens: int = 5,
    begun_s: float = 100.0,
    prompt_tokens: int | None = None,
) -> BatchTrace:
    """A batch whose engine took exactly so long."""
    starts, ends, now_s = [begun_s], [begun_s + ttft_s], begun_s + ttft_s
    for _ in range(output_tokens - 1):
        starts.append(now_s)
        now_s += step_s
        ends.append(now_s)
    return BatchTrace(
        batch_size=batch_size,
        submitted_s=begun_s,
        steps_started_s=tuple(starts),
        steps_ended_s=tuple(ends),
        steps_tokens=(batch_size,) * output_tokens,
        first_token_step=0,
        prompts_sha256="0" * 64,
        prompt_tokens=prompt_tokens,
    )


def rounds(
    count: int,
    *,
    ratio: float,
    noise: float = 0.01,
    drift: float = 0.0,
    stalled: Sequence[int] = (),
    batch_sizes: Sequence[int] = (1,),
    cells: Sequence[Cell] = (),
    candidate_batch: int | None = None,
    speed: float = 1.0,
    seed: int = 0,
) -> list[Round]:
    """Rounds of a candidate that is truly `ratio` times faster, on a machine with this noise, drift and stalls.

    Args:
        count: rounds, each with every batch size.
        ratio: true speed-up of both phases.
        noise: standard deviation of each measurement's own logarithm.
        drift: by how much the machine is slower in the last round than in the first.
        stalled: rounds in which one model took ten times as long.
        batch_sizes: of the baseline.
        cells: batches with prompts of their own length, in place of `batch_sizes`.
        candidate_batch: of the candidate where it differs.
        speed: of the machine.
        seed: of the noise.
    """
    draw = random.Random(seed)
    made = []
    for index in range(count):
        machine = (1 + drift * index / max(1, count - 1)) / speed
        for size, prompt in [(one.batch_size, one.prompt_tokens) for one in cells] or [(n, None) for n in batch_sizes]:
            factor = [machine * draw.lognormvariate(0, noise) for _ in range(2)]
            if index in stalled:
                factor[index % 2] *= 10
            made.append(
                Round(
                    first="baseline" if index % 2 == 0 else "candidate",
                    prompts_sha256="0" * 64,
                    baseline=trace(
                        ttft_s=0.4 * size * factor[0], step_s=0.1 * factor[0], batch_size=size, prompt_tokens=prompt
                    ),
                    candidate=trace(
                        ttft_s=0.4 * size * factor[1] / ratio,
                        step_s=0.1 * factor[1] / ratio,
                        batch_size=candidate_batch or size,
                        prompt_tokens=prompt,
                    ),
                    other_cpu_share=0.0,
                    waiting_engine_cpu_share=0.0,
                )
            )
    return made


def pair(**settings: object) -> Pair:
    """Both phases of the paper's shapes."""
    chosen = SpeedupSettings.model_validate({"regimes": (Regime.PREFILL, Regime.DECODE), **settings})
    return Pair(baseline=DENSE, candidate=NARROW, candidate_batch=None, settings=chosen, dtype_bytes=2)


MACHINE: dict[str, str | int | list[str]] = {
    "cpu_model": "Made-up CPU", "cpu_cores": 2, "cpu_flags": ["avx2"], "memory_bytes": 2**34, "accelerator": "none",
    "platform": "Linux", "python": "3.11", "torch": "2.13.0", "vllm": "0.32.0",
}  # fmt: skip
_RATES = MachineRates(dtype="float32", bytes_per_s=20e9, flops_per_s=100e9)
_FLOORS = Floors(shape=DENSE, rates=_RATES, dtype_bytes=4)


def speedup_result(*, ratio: float = 1.3, noise: float = 0.03, **settings: object) -> SpeedupResult:
    """A whole check with made-up rounds."""
    chosen = pair(**settings)
    measured = rounds(12, ratio=ratio, noise=noise, cells=chosen.settings.cells)
    regimes = chosen.analyse(measured)
    judgement = conclude(regimes, measured, chosen.settings.claimed)
    average = chosen.average(regimes)

    def model(name: str, shape: ModelSizes) -> ModelRecord:
        budget = memory_for(DENSE, requests=1, tokens=137, dtype_bytes=4)
        return ModelRecord(
            name=name, config_sha256="ab" * 32, shape=shape, parameters=shape.parameters, start_s=30.0,
            peak_memory_bytes=6 * 2**30 if shape is DENSE else 5 * 2**30, batch_size=1,
            capacity=capacity(shape, memory_bytes=budget, tokens=137, dtype_bytes=4),
            warm_up=WarmUp(traces=(trace(ttft_s=0.4, step_s=0.1),), stationary=True),
        )  # fmt: skip

    return SpeedupResult(
        date="2026-11-22T12:00:00+00:00", duration_s=120.0, machine=MACHINE, dtype="float32", settings=chosen.settings,
        baseline=model("llama2-7b", DENSE), candidate=model("llama2-7b-pat25", NARROW), regimes=regimes,
        average=average, stopped="12 rounds were asked for", verdict=judgement.verdict, strict_verdict=judgement.strict,
        reason=judgement.reason, advice=(),
        rounds=tuple(measured),
    )  # fmt: skip


def depths_result() -> SpeedupResult:
    """A check at two and at six layers, of models of 32. Fixed work, a tenth of a layer's time, does not gain."""
    result = speedup_result(claim=1.33)
    measured = []
    for layers in (2, 6):
        ratio = (0.1 + layers) / (0.1 + layers / 1.34)
        shapes = [replace(shape, layers=layers) for shape in (DENSE, NARROW)]
        own = Pair(
            baseline=shapes[0], candidate=shapes[1], candidate_batch=None, settings=result.settings, dtype_bytes=2
        )
        made = rounds(12, ratio=ratio, noise=0.003, speed=1 / (0.1 + layers))
        models = [
            one.model_copy(update={"shape": shape})
            for one, shape in zip((result.baseline, result.candidate), shapes, strict=True)
        ]
        measured.append(
            DepthMeasurement(
                layers=layers, baseline=models[0], candidate=models[1],
                regimes=own.analyse(made, [one.warm_up for one in models]), rounds=tuple(made), stopped=result.stopped,
            )
        )  # fmt: skip
    whole = [replace(shape, layers=32) for shape in (DENSE, NARROW)]
    settings = result.settings.model_copy(update={"depths": (2, 6)})
    found = extrapolate_all(measured, settings, whole=(whole[0], whole[1]), dtype_bytes=2)
    judgement = conclude_extrapolated(found, measured, settings)
    deep = measured[-1]
    budget = memory_for(whole[0], requests=1, tokens=137, dtype_bytes=4)
    return result.model_copy(
        update={
            "settings": settings, "baseline": deep.baseline, "candidate": deep.candidate, "regimes": deep.regimes,
            "rounds": deep.rounds, "extrapolated": found, "shallower": (measured[0],), "verdict": judgement.verdict,
            "strict_verdict": judgement.strict, "reason": judgement.reason,
            "whole_capacities": tuple(
                capacity(shape, memory_bytes=budget, tokens=137, dtype_bytes=4) for shape in whole
            ),
        }
    )  # fmt: skip


def _head(name: str) -> dict[str, Any]:
    return {
        "date": "2026-11-22T12:00:00+00:00", "duration_s": 60.0, "machine": MACHINE, "rates": _RATES, "model": name,
        "config_sha256": "cd" * 32, "shape": DENSE, "parameters": DENSE.parameters, "dtype": "float32",
        "start_s": 30.0, "peak_memory_bytes": 5 * 2**30,
    }  # fmt: skip


def latency_result(name: str, *, faster: float = 1.0) -> LatencyResult:
    """Two cells of ten rounds with a little spread."""
    draw = random.Random(1)
    cells = []
    for batch in (1, 4):
        traces = [
            trace(
                ttft_s=0.4 * batch**0.9 * (spread := draw.lognormvariate(0, 0.08)) / faster,
                step_s=0.1 * (1 + 0.05 * batch) * spread / faster, batch_size=batch, output_tokens=9,
            )
            for _ in range(10)
        ]  # fmt: skip
        cells.append(latency_cell(traces, prompt_tokens=64, output_tokens=9, floors=_FLOORS))
    return LatencyResult(settings=LatencySettings(batch_sizes=(1, 4)), cells=tuple(cells), **_head(name))


def throughput_result(name: str) -> ThroughputResult:
    """A ladder of loads that saturates."""
    settings = ThroughputSettings(prompt_tokens=64, output_tokens=4)
    runs = []
    for concurrency, step_s in ((1, 0.1), (2, 0.11), (4, 0.14), (8, 0.27)):
        requests = [
            RequestTrace(submitted_s=0.0, tokens_s=tuple(0.3 + step_s * index for index in range(4)))
            for _ in range(concurrency)
        ]
        runs.append(throughput_run(requests, concurrency=concurrency, settings=settings, floors=_FLOORS))
    return ThroughputResult(settings=settings, runs=tuple(runs), saturation=4, **_head(name))


def load_result(name: str) -> LoadResult:
    """Three rates; latency rises with load."""
    settings = LoadSettings(url="http://127.0.0.1:8000", rates=(1, 2, 4), slo={"ttft": 0.2, "tpot": 0.05})
    draw = random.Random(2)
    runs = []
    for rate in settings.rates:
        requests = []
        for index in range(int(rate * 20)):
            sent_s = 1000.0 + index / rate
            first_s = sent_s + 0.08 * (1 + rate**1.5 / 4) * draw.lognormvariate(0, 0.3)
            last_s = first_s + 15 * 0.02 * (1 + rate / 3) * draw.lognormvariate(0, 0.1)
            requests.append(
                LoadRequest(
                    targeted_s=sent_s, sent_s=sent_s, first_token_s=first_s, last_token_s=last_s, output_tokens=16,
                    outcome="completed",
                )
            )  # fmt: skip
        runs.append(load_run(requests, name=f"poisson {rate:g}/s", rate=rate, duration_s=20.0, slo=settings.slo))
    return LoadResult(
        date="2026-11-22T12:00:00+00:00", duration_s=80.0, machine=MACHINE, guidellm="0.8.1", settings=settings,
        model=name, tokenizer="tok", runs=tuple(runs),
    )  # fmt: skip
