"""Check a claimed speed-up: two engines side by side, paired interleaved rounds, one verdict for each regime.

Both engines stay alive throughout and only one works at a time. What the machine does over minutes (clock, temperature,
neighbours) then meets both halves of a pair alike and cancels in its ratio, which measuring one model after the other
would not give. Cut models are measured at several depths, one pair of engines after the other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pat_serve.machine.extras import require
from pat_serve.machine.hardware import DTYPE_BYTES, describe, serving_dtype
from pat_serve.server.analysis.statistics import PairedRatio
from pat_serve.server.analysis.verdict import Judgement, Verdict
from pat_serve.server.bench.model_source import ModelSource, resolve
from pat_serve.server.bench.scratch import scratch_folder
from pat_serve.server.bench.speedup.advice import advise
from pat_serve.server.bench.speedup.analysis import conclude, conclude_average
from pat_serve.server.bench.speedup.checks import (
    candidate_settings,
    check_memory,
    check_pair,
    check_settings,
    depths_that_fit,
    fitting_requests,
)
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.depths import conclude_extrapolated, extrapolate_all, worst_surroundings
from pat_serve.server.bench.speedup.result import DepthMeasurement, ModelRecord, Round, SpeedupResult, WarmUp
from pat_serve.server.bench.speedup.rounds import warm_up
from pat_serve.server.bench.speedup.series import Pair, Progress, measure_rounds
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.memory import kv_cache_bytes
from pat_serve.server.engine.workers.probe import PROBE_ROWS, MachineRates, best_rates
from pat_serve.server.engine.workers.process import EngineProcess, start_together
from pat_serve.server.engine.workers.protocol import Ready, Start


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """Both models, cut to `layers` or whole, and what each is to run."""

    baseline: ModelSource
    candidate: ModelSource
    settings: SpeedupSettings
    candidate_settings: SpeedupSettings


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What was seen of a pair of engines."""

    pair: Pair
    records: tuple[ModelRecord, ModelRecord]
    rounds: list[Round]
    stopped: str
    rounds_s: float
    probes: list[MachineRates]


def check_speedup(baseline: str, candidate: str, settings: SpeedupSettings, *, progress: Progress) -> SpeedupResult:
    """Measure a candidate's speed-up over a baseline and judge the claim.

    Args:
        baseline: dense model: folder, hub id, or the name of a shipped shape.
        candidate: the one that is claimed to be faster.
        settings: what to measure. Without layers, random weights that do not fit are cut to two depths that do.
        progress: called with news as it goes.

    Raises:
        MissingExtra: vLLM is not installed.
        UsageError: settings that make no sense, or models with different vocabularies.
        ModelError: a model that is not there or not readable.
        EngineError: not enough memory for two engines, or an engine failed; its log is then kept.
    """
    check_settings(settings)
    require("vllm", "cpu", "cuda", wanted_by="pat-bench speedup")
    date, begun_s, dtype = (
        datetime.now(UTC).isoformat(timespec="seconds"),
        time.monotonic(),
        serving_dtype(settings.dtype),
    )
    with scratch_folder() as scratch:
        whole = _sources(baseline, candidate, settings.with_layers(None), dtype, scratch)
        if (
            settings.load_format == "dummy"
            and settings.layers is None
            and not settings.depths
            and _one_by_one(settings)
        ):
            depths = depths_that_fit(whole.baseline, whole.candidate, settings, dtype)
            settings = settings.model_copy(update={"depths": depths})
        # All are looked at before the first engine starts.
        pairs = [
            _sources(baseline, candidate, settings.with_layers(layers), dtype, scratch)
            for layers in settings.measured_depths
        ]
        for one in pairs:
            check_memory(one.baseline, one.candidate, one.settings, dtype)
        measured = [_measure(one, dtype, scratch, progress) for one in pairs]
    # What it reads and multiplies is the machine's: the best of all probes holds for every depth.
    probes = [probe for one in measured for probe in one.probes]
    depths_measured = [_depth(replace(one.pair, probes=probes), one) for one in measured]
    deepest, average = depths_measured[-1], measured[-1].pair.average(depths_measured[-1].regimes)
    extrapolated = (
        extrapolate_all(
            depths_measured,
            settings,
            whole=(whole.baseline.shape, whole.candidate.shape),
            dtype_bytes=DTYPE_BYTES[dtype],
        )
        if settings.depths
        else ()
    )
    judgement = _judge(depths_measured, extrapolated, average, settings)
    advice = advise(
        extrapolated or deepest.regimes,
        average if settings.judge_average else None,
        claim=settings.claimed,
        seconds_per_round=sum(one.rounds_s * len(settings.batches) / len(one.rounds) for one in measured),
        surroundings=worst_surroundings(depths_measured),
    )
    return SpeedupResult(
        date=date,
        duration_s=time.monotonic() - begun_s,
        machine=describe(),
        dtype=dtype,
        settings=settings,
        baseline=deepest.baseline,
        candidate=deepest.candidate,
        regimes=deepest.regimes,
        average=average,
        stopped=deepest.stopped,
        verdict=judgement.verdict,
        strict_verdict=judgement.strict,
        reason=judgement.reason,
        advice=advice if judgement.verdict is Verdict.INCONCLUSIVE else (),
        rounds=deepest.rounds,
        rates=best_rates(probes),
        probes=tuple(probes),
        extrapolated=extrapolated,
        shallower=tuple(depths_measured[:-1]),
    )


def _one_by_one(settings: SpeedupSettings) -> bool:
    """Whether each phase and batch is judged by itself, at an equal batch, as several depths need it."""
    return not (settings.fixed_memory or settings.judge_average)


def _sources(baseline: str, candidate: str, settings: SpeedupSettings, dtype: str, scratch: Path) -> _Sources:
    found = []
    for label, name in (("baseline", baseline), ("candidate", candidate)):
        folder = scratch / f"{label}-{settings.layers or 'whole'}"
        folder.mkdir(exist_ok=True)
        found.append(
            resolve(name, flag=f"--{label}", load_format=settings.load_format, layers=settings.layers, scratch=folder)
        )
    check_pair(found[0], found[1], settings)
    return _Sources(
        baseline=found[0],
        candidate=found[1],
        settings=settings,
        candidate_settings=candidate_settings(found[0], found[1], settings, dtype),
    )


def _measure(sources: _Sources, dtype: str, scratch: Path, progress: Progress) -> _Measured:
    settings, others = sources.settings, sources.candidate_settings
    baseline, candidate = sources.baseline, sources.candidate
    at = "" if settings.layers is None else f", {settings.layers} layers"
    pair = Pair(
        baseline=baseline.shape,
        candidate=candidate.shape,
        candidate_batch=others.batch_size if settings.fixed_memory else None,
        settings=settings,
        dtype_bytes=DTYPE_BYTES[dtype],
    )
    with (
        EngineProcess(
            "baseline", log=scratch / f"baseline{settings.layers or ''}.log", offline=baseline.on_disk
        ) as first,
        EngineProcess(
            "candidate", log=scratch / f"candidate{settings.layers or ''}.log", offline=candidate.on_disk
        ) as second,
    ):
        probes: list[MachineRates] = []

        def probe() -> None:
            if settings.roofline:
                progress(f"probing the machine{at}", 0, settings.rounds)
                rows = min(settings.full_batch.step_tokens, PROBE_ROWS)
                probes.extend(engine.probe(rows=rows) for engine in (first, second))

        progress(f"starting two engines{at}", 0, settings.rounds)
        ready = start_together(
            {
                first: _start_command(baseline, settings, dtype),
                second: _start_command(candidate, others, dtype),
            }
        )
        # Before and after the rounds, by the engines themselves.
        probe()
        progress(f"warming up{at}", 0, settings.rounds)
        warm_ups = (
            warm_up(first, settings, baseline.shape.vocab_size),
            warm_up(second, others, baseline.shape.vocab_size),
        )
        rounds, stopped, rounds_s = measure_rounds(
            first, second, pair, warm_ups, lambda stage, done, total: progress(f"{stage}{at}", done, total)
        )
        probe()
        peaks = [engine.peak_memory_bytes() for engine in (first, second)]

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

    return _Measured(
        pair=pair,
        records=(
            record(baseline, settings, ready[first], peaks[0], warm_ups[0]),
            record(candidate, others, ready[second], peaks[1], warm_ups[1]),
        ),
        rounds=rounds,
        stopped=stopped,
        rounds_s=rounds_s,
        probes=probes,
    )


def _depth(pair: Pair, measured: _Measured) -> DepthMeasurement:
    baseline, candidate = measured.records
    return DepthMeasurement(
        layers=pair.baseline.num_layers,
        baseline=baseline,
        candidate=candidate,
        regimes=pair.analyse(measured.rounds, (baseline.warm_up, candidate.warm_up)),
        rounds=tuple(measured.rounds),
        stopped=measured.stopped,
    )


def _judge(
    depths: list[DepthMeasurement],
    extrapolated: tuple[Extrapolated, ...],
    average: PairedRatio | None,
    settings: SpeedupSettings,
) -> Judgement:
    deepest = depths[-1]
    if settings.depths:
        return conclude_extrapolated(extrapolated, depths, settings)
    if average is not None and settings.judge_average:
        return conclude_average(average, deepest.regimes, settings.claimed, worst_surroundings(depths))
    return conclude(deepest.regimes, deepest.rounds, settings.claimed)


def _start_command(source: ModelSource, settings: SpeedupSettings, dtype: str) -> Start:
    return Start(
        model=source.path,
        dtype=dtype,
        load_format=settings.load_format,
        batch_size=settings.largest_batch,
        max_model_tokens=settings.tokens_per_request,
        max_step_tokens=settings.full_batch.step_tokens,
        kv_cache_bytes=kv_cache_bytes(source.shape, settings.full_batch, dtype),
        enforce_eager=settings.enforce_eager,
        seed=settings.seed,
    )


def config_sha256(config: Mapping[str, object]) -> str:
    """Digest of a config.json, keys sorted."""
    # A running engine's config may hold what JSON has no form for, such as a dtype.
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
