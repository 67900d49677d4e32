"""Check a claimed speed-up: two engines side by side, paired interleaved rounds, one verdict for each regime.

Both engines stay alive throughout and only one works at a time. What the machine does over minutes (clock, temperature,
neighbours) then meets both halves of a pair alike and cancels in its ratio, which measuring one model after the other
would not give.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pat_serve.extras import require
from pat_serve.hardware import DTYPE_BYTES, describe, serving_dtype
from pat_serve.server.analysis.advice import advise
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.model_source import ModelSource, resolve
from pat_serve.server.bench.scratch import scratch_folder
from pat_serve.server.bench.speedup_analysis import conclude, conclude_average, surroundings_of
from pat_serve.server.bench.speedup_checks import (
    candidate_settings,
    check_memory,
    check_pair,
    check_settings,
    fitting_requests,
    kv_cache_bytes,
    step_tokens,
)
from pat_serve.server.bench.speedup_result import ModelRecord, SpeedupResult, SpeedupSettings, WarmUp
from pat_serve.server.bench.speedup_rounds import warm_up
from pat_serve.server.bench.speedup_series import Pair, Progress, measure_rounds
from pat_serve.server.workers.probe import probe_machine
from pat_serve.server.workers.process import EngineProcess, start_together
from pat_serve.server.workers.protocol import Ready, Start


def check_speedup(baseline: str, candidate: str, settings: SpeedupSettings, *, progress: Progress) -> SpeedupResult:
    """Measure a candidate's speed-up over a baseline and judge the claim.

    Args:
        baseline: dense model: folder, hub id, or the name of a shipped shape.
        candidate: the one that is claimed to be faster.
        settings: what to measure.
        progress: called with news as it goes.

    Raises:
        MissingExtra: vLLM is not installed.
        UsageError: settings that make no sense, or models with different vocabularies.
        ModelError: a model that is not there or not readable.
        EngineError: not enough memory for two engines, or an engine failed; its log is then kept.
    """
    check_settings(settings)
    require("vllm", "cpu", "cuda", wanted_by="pat-bench speedup")
    dtype = serving_dtype(settings.dtype)
    with scratch_folder() as scratch:
        sources = {
            "baseline": _resolve(baseline, "baseline", settings, scratch),
            "candidate": _resolve(candidate, "candidate", settings, scratch),
        }
        check_pair(sources["baseline"], sources["candidate"], settings)
        check_memory(sources["baseline"], sources["candidate"], settings, dtype)
        return _measure(sources["baseline"], sources["candidate"], settings, dtype, scratch, progress)


def _resolve(name: str, label: str, settings: SpeedupSettings, scratch: Path) -> ModelSource:
    folder = scratch / label
    folder.mkdir()
    return resolve(name, flag=f"--{label}", load_format=settings.load_format, layers=settings.layers, scratch=folder)


def _measure(
    baseline: ModelSource,
    candidate: ModelSource,
    settings: SpeedupSettings,
    dtype: str,
    scratch: Path,
    progress: Progress,
) -> SpeedupResult:
    date, begun_s = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    others = candidate_settings(baseline, candidate, settings, dtype)
    rates = None
    if settings.roofline:
        progress("probing the machine", 0, settings.rounds)
        rates = probe_machine(dtype, scratch=scratch)
    pair = Pair(
        baseline=baseline.shape,
        candidate=candidate.shape,
        candidate_batch=others.batch_size if settings.fixed_memory else None,
        settings=settings,
        dtype_bytes=DTYPE_BYTES[dtype],
        rates=rates,
    )
    with (
        EngineProcess("baseline", log=scratch / "baseline.log", offline=baseline.on_disk) as first,
        EngineProcess("candidate", log=scratch / "candidate.log", offline=candidate.on_disk) as second,
    ):
        progress("starting two engines", 0, settings.rounds)
        ready = start_together(
            {
                first: _start_command(baseline, settings, dtype),
                second: _start_command(candidate, others, dtype),
            }
        )
        progress("warming up", 0, settings.rounds)
        warm_ups = (
            warm_up(first, settings, baseline.shape.vocab_size),
            warm_up(second, others, baseline.shape.vocab_size),
        )
        rounds, stopped, rounds_s = measure_rounds(first, second, pair, warm_ups, progress)
        peaks = [engine.peak_memory_bytes() for engine in (first, second)]
    regimes, surroundings = pair.analyse(rounds, warm_ups), surroundings_of(rounds, warm_ups)
    average = pair.average(regimes)
    if average is not None and settings.judge_average:
        judgement = conclude_average(average, regimes, settings.claimed, surroundings)
    else:
        judgement = conclude(regimes, rounds, settings.claimed)
    advice = advise(
        regimes,
        average if settings.judge_average else None,
        claim=settings.claimed,
        seconds_per_round=rounds_s * len(settings.batches) / len(rounds),
        surroundings=surroundings,
    )

    def record(source: ModelSource, own: SpeedupSettings, start: Ready, peak: int, warmed: WarmUp) -> ModelRecord:
        return ModelRecord(
            name=source.name,
            config_sha256=config_sha256(source.config),
            shape=source.shape,
            parameters=source.shape.parameters,
            start_s=start.start_s,
            peak_memory_bytes=peak,
            gpu_memory_bytes=start.gpu_memory_bytes,
            batch_size=own.largest_batch,
            capacity=fitting_requests(baseline, source, settings, dtype),
            warm_up=warmed,
        )

    return SpeedupResult(
        date=date,
        duration_s=time.monotonic() - begun_s,
        machine=describe(),
        dtype=dtype,
        settings=settings,
        baseline=record(baseline, settings, ready[first], peaks[0], warm_ups[0]),
        candidate=record(candidate, others, ready[second], peaks[1], warm_ups[1]),
        regimes=regimes,
        average=average,
        stopped=stopped,
        verdict=judgement.verdict,
        strict_verdict=judgement.strict,
        reason=judgement.reason,
        advice=advice if judgement.verdict is Verdict.INCONCLUSIVE else (),
        rounds=tuple(rounds),
        rates=rates,
    )


def _start_command(source: ModelSource, settings: SpeedupSettings, dtype: str) -> Start:
    return Start(
        model=source.path,
        dtype=dtype,
        load_format=settings.load_format,
        batch_size=settings.largest_batch,
        max_model_tokens=settings.tokens_per_request,
        max_step_tokens=step_tokens(settings),
        kv_cache_bytes=kv_cache_bytes(source, settings, dtype),
        enforce_eager=settings.enforce_eager,
        seed=settings.seed,
    )


def config_sha256(config: Mapping[str, object]) -> str:
    """Digest of a config.json, keys sorted."""
    # A running engine's config may hold what JSON has no form for, such as a dtype.
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
