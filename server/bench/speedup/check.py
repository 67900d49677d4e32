"""Check a claimed speed-up: two engines side by side, paired interleaved rounds, one verdict for each regime.

Both engines stay alive throughout, and only one works at a time. A drift of the machine over minutes (clock,
temperature, neighbours) then meets both halves of a pair alike, and cancels in their ratio. The drift would not cancel
if one model were measured after the other. Cut models are measured at several depths, one pair of engines after the
other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pat_serve.machine.extras import require
from pat_serve.machine.hardware import DTYPE_BYTES, serving_dtype
from pat_serve.server.bench.model_source import ModelSource, check_dtype, config_sha256, resolve
from pat_serve.server.bench.scratch import scratch_folder
from pat_serve.server.bench.speedup.checks import (
    candidate_settings,
    check_memory,
    check_pair,
    check_settings,
    depths_that_fit,
    fitting_requests,
)
from pat_serve.server.bench.speedup.conclusion import Beginning, sum_up
from pat_serve.server.bench.speedup.depths import extrapolate_all
from pat_serve.server.bench.speedup.result import DepthMeasurement, ModelRecord, Round, SpeedupResult, WarmUp
from pat_serve.server.bench.speedup.rounds import warm_up
from pat_serve.server.bench.speedup.series import Pair, Progress, measure_rounds
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.memory import kv_cache_bytes
from pat_serve.server.engine.workers.probe import PROBE_ROWS, MachineRates
from pat_serve.server.engine.workers.process import EngineProcess, start_together
from pat_serve.server.engine.workers.protocol import Ready, Start


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """Both models, cut to `layers` or whole, and the settings of each."""

    baseline: ModelSource
    candidate: ModelSource
    settings: SpeedupSettings
    candidate_settings: SpeedupSettings


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """The measurements of a pair of engines."""

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
    begun, dtype = Beginning.now(), serving_dtype(settings.dtype)
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
        # All pairs are checked before the first engine starts.
        pairs = [
            _sources(baseline, candidate, settings.with_layers(layers), dtype, scratch)
            for layers in settings.measured_depths
        ]
        for one in pairs:
            check_memory(one.baseline, one.candidate, one.settings, dtype)
        measured = [_measure(one, dtype, scratch, progress) for one in pairs]
    # The rates belong to the machine, so the best of all probes holds for every depth.
    probes = [probe for one in measured for probe in one.probes]
    depths_measured = [_depth(replace(one.pair, probes=probes), one) for one in measured]
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
    return sum_up(
        depths_measured,
        settings,
        begun=begun,
        dtype=dtype,
        seconds_per_round=sum(one.rounds_s * len(settings.cells) / len(one.rounds) for one in measured),
        average=measured[-1].pair.average(depths_measured[-1].regimes),
        extrapolated=extrapolated,
        whole_capacities=tuple(
            fitting_requests(whole.baseline, one, settings, dtype) for one in (whole.baseline, whole.candidate)
        )
        if settings.depths
        else (),
        probes=probes,
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
    for source in found:
        check_dtype(source, dtype)
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
        ) as baseline_engine,
        EngineProcess(
            "candidate", log=scratch / f"candidate{settings.layers or ''}.log", offline=candidate.on_disk
        ) as candidate_engine,
    ):
        probes: list[MachineRates] = []

        def probe() -> None:
            if settings.roofline:
                progress(f"probing the machine{at}", 0, settings.rounds)
                rows = min(_step_tokens(settings), PROBE_ROWS)
                probes.extend(engine.probe(rows=rows) for engine in (baseline_engine, candidate_engine))

        progress(f"starting two engines{at}", 0, settings.rounds)
        ready = start_together(
            {
                baseline_engine: _start_command(baseline, settings, dtype),
                candidate_engine: _start_command(candidate, others, dtype),
            }
        )
        # The engines themselves probe, before the rounds and after them.
        probe()
        progress(f"warming up{at}", 0, settings.rounds)
        warm_ups = (
            warm_up(baseline_engine, settings, baseline.shape.vocab),
            warm_up(candidate_engine, others, baseline.shape.vocab),
        )
        rounds, stopped, rounds_s = measure_rounds(
            baseline_engine,
            candidate_engine,
            pair,
            warm_ups,
            lambda stage, done, total: progress(f"{stage}{at}", done, total),
        )
        probe()
        peaks = [engine.peak_memory_bytes() for engine in (baseline_engine, candidate_engine)]

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
            record(baseline, settings, ready[baseline_engine], peaks[0], warm_ups[0]),
            record(candidate, others, ready[candidate_engine], peaks[1], warm_ups[1]),
        ),
        rounds=rounds,
        stopped=stopped,
        rounds_s=rounds_s,
        probes=probes,
    )


def _depth(pair: Pair, measured: _Measured) -> DepthMeasurement:
    baseline, candidate = measured.records
    return DepthMeasurement(
        layers=pair.baseline.layers,
        baseline=baseline,
        candidate=candidate,
        regimes=pair.analyse(measured.rounds, (baseline.warm_up, candidate.warm_up)),
        rounds=tuple(measured.rounds),
        stopped=measured.stopped,
    )


def _step_tokens(settings: SpeedupSettings) -> int:
    return max(batch.step_tokens for batch in settings.full_batches)


def _start_command(source: ModelSource, settings: SpeedupSettings, dtype: str) -> Start:
    return Start(
        model=source.path,
        dtype=dtype,
        load_format=settings.load_format,
        batch_size=settings.largest_batch,
        max_model_tokens=settings.tokens_per_request,
        max_step_tokens=_step_tokens(settings),
        kv_cache_bytes=max(kv_cache_bytes(source.shape, batch, dtype) for batch in settings.full_batches),
        enforce_eager=settings.enforce_eager,
        read_prefix_cache=settings.repeats_prompts,
        seed=settings.seed,
    )
