"""`pat-bench latency` and `throughput`: one model, one engine process, a grid or a ladder of loads."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pat_serve.errors import UsageError, want
from pat_serve.machine.extras import require
from pat_serve.machine.hardware import DTYPE_BYTES, describe, serving_dtype
from pat_serve.server.bench.latency.result import (
    EngineSettings,
    LatencyCell,
    LatencyResult,
    LatencySettings,
    ThroughputResult,
    ThroughputRun,
    ThroughputSettings,
)
from pat_serve.server.bench.latency.summary import Floors, latency_cell, throughput_run
from pat_serve.server.bench.model_source import ModelSource, check_dtype, config_sha256, resolve
from pat_serve.server.bench.scratch import scratch_folder
from pat_serve.server.bench.speedup.checks import (
    check_context,
    least_output_tokens,
)
from pat_serve.server.engine.memory import MAX_STEP_TOKENS, Batch, engine_memory_bytes, kv_cache_bytes, require_memory
from pat_serve.server.engine.workers.probe import PROBE_ROWS, best_rates
from pat_serve.server.engine.workers.process import EngineProcess, start_together
from pat_serve.server.engine.workers.protocol import Ready, Start

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# Doubling the load must bring so much more throughput, or the engine is saturated.
_WORTH = 1.05
_WARMUP_RUNS = 2


def measure_latency(model: str, settings: LatencySettings, *, progress: Progress) -> LatencyResult:
    """Time every cell of the grid.

    Args:
        model: folder, hub id, or the name of a shipped shape.
        settings: the grid.
        progress: called with news as it goes.

    Raises:
        MissingExtra: vLLM is not installed.
        UsageError: settings that make no sense.
        ModelError: a model that is not there or not readable.
        EngineError: not enough memory, or the engine failed; its log is then kept.
    """
    grid = list(itertools.product(settings.batch_sizes, settings.prompt_tokens, settings.output_tokens))
    if settings.rounds < 1:
        raise UsageError("--rounds", expected="at least 1", found=str(settings.rounds), fix="Try --rounds 10.")
    for batch, prompt, output in grid:
        want("--prompt-tokens", prompt >= 1, "at least 1", prompt, "Try --prompt-tokens 128.")
        want("--output-tokens", output >= 1, "at least 1", output, "Try --output-tokens 32.")
        if not 1 <= batch < MAX_STEP_TOKENS:
            raise UsageError(
                "--batch-size", expected=f"1 to {MAX_STEP_TOKENS - 1}", found=str(batch), fix="Try --batch-size 1."
            )
        least = least_output_tokens(batch, prompt)
        if 1 < output < least:
            raise UsageError(
                "--output-tokens",
                expected=f"1, or at least {least} to time decode at batch {batch} and {prompt} prompt tokens",
                found=str(output),
                fix="Ask for more output tokens.",
            )
    # The engine is made for all cells, so the largest value of each axis counts.
    widest = max(batch * prompt for batch, prompt, _ in grid)
    largest = _batch(max(settings.batch_sizes), max(settings.prompt_tokens), max(settings.output_tokens))

    def run(engine: EngineProcess, source: ModelSource) -> list[LatencyCell]:
        cells = []
        for index, (batch, prompt, output) in enumerate(grid):
            progress("measuring cells", index, len(grid))
            draw = random.Random(f"{settings.seed}/{batch}/{prompt}/{output}")
            traces = []
            for number in range(_WARMUP_RUNS + settings.rounds):
                prompts = [[draw.randrange(source.shape.vocab) for _ in range(prompt)] for _ in range(batch)]
                trace = engine.prefill(prompts, output_tokens=output) or engine.decode(output)
                while trace is None:
                    trace = engine.decode(1)
                if number >= _WARMUP_RUNS:
                    traces.append(trace)
            cells.append(latency_cell(traces, prompt_tokens=prompt, output_tokens=output, floors=None))
        progress("measuring cells", len(grid), len(grid))
        return cells

    common, cells, floors = _with_engine(model, settings, largest, widest, progress, run)
    beside = [
        latency_cell(
            cell.traces,
            prompt_tokens=cell.prompt_tokens,
            output_tokens=cell.output_tokens,
            floors=floors,
            probes=common["probes"],
        )
        for cell in cells
    ]
    return LatencyResult(settings=settings, cells=tuple(beside), **common)


def measure_throughput(model: str, settings: ThroughputSettings, *, progress: Progress) -> ThroughputResult:
    """Keep requests in flight, at the given concurrencies and on to saturation; arguments and errors as above."""
    ladder = sorted(set(settings.concurrencies))
    for flag, value, fix in (
        ("--concurrency", ladder[0], "Try --concurrency 1,4."),
        ("--prompt-tokens", settings.prompt_tokens, "Try --prompt-tokens 64."),
        ("--output-tokens", settings.output_tokens, "Try --output-tokens 16."),
        ("--waves", settings.waves, "Try --waves 3."),
    ):
        want(flag, value >= 1, "at least 1", value, fix)
    most = max(ladder[-1], settings.max_concurrency) if settings.saturate else ladder[-1]
    largest = _batch(most, settings.prompt_tokens, settings.output_tokens)

    def run(engine: EngineProcess, source: ModelSource) -> tuple[list[ThroughputRun], int | None]:
        draw = random.Random(settings.seed)

        def serve(concurrency: int, waves: int) -> ThroughputRun:
            vocabulary, count = source.shape.vocab, concurrency * waves
            prompts = [[draw.randrange(vocabulary) for _ in range(settings.prompt_tokens)] for _ in range(count)]
            served = engine.serve(prompts, output_tokens=settings.output_tokens, concurrency=concurrency)
            return throughput_run(served.requests, concurrency=concurrency, settings=settings, floors=None)

        serve(ladder[0], 1)
        runs: list[ThroughputRun] = []
        for index, concurrency in enumerate(ladder):
            progress(f"{concurrency} in flight", index, len(ladder))
            runs.append(serve(concurrency, settings.waves))
        saturation = None
        while settings.saturate and saturation is None and runs[-1].concurrency * 2 <= most:
            concurrency = runs[-1].concurrency * 2
            progress(f"{concurrency} in flight", len(runs), len(runs) + 1)
            runs.append(serve(concurrency, settings.waves))
            if runs[-1].output_tokens_per_s < _WORTH * runs[-2].output_tokens_per_s:
                saturation = max(runs[-2:], key=lambda one: one.output_tokens_per_s).concurrency
        return runs, saturation

    widest = most * settings.prompt_tokens
    common, (runs, saturation), floors = _with_engine(model, settings, largest, widest, progress, run)
    beside = [
        throughput_run(one.requests, concurrency=one.concurrency, settings=settings, floors=floors) for one in runs
    ]
    return ThroughputResult(settings=settings, runs=tuple(beside), saturation=saturation, **common)


def _batch(requests: int, prompt_tokens: int, output_tokens: int) -> Batch:
    return Batch(requests=requests, prompt_tokens=prompt_tokens, tokens_per_request=prompt_tokens + output_tokens)


def _with_engine(
    model: str,
    settings: EngineSettings,
    batch: Batch,
    widest: int,
    progress: Progress,
    run: Callable[[EngineProcess, ModelSource], Any],
) -> tuple[dict[str, Any], Any, Floors | None]:
    """Start an engine that is large enough, run, and gather the fields that every record has."""
    require("vllm", "cpu", "cuda", wanted_by="pat-bench")
    date, begun_s, dtype = (
        datetime.now(UTC).isoformat(timespec="seconds"),
        time.monotonic(),
        serving_dtype(settings.dtype),
    )
    with scratch_folder() as scratch:
        source = resolve(
            model, flag="--model", load_format=settings.load_format, layers=settings.layers, scratch=scratch
        )
        check_dtype(source, dtype)
        _check(source, batch, dtype)
        with EngineProcess("model", log=scratch / "engine.log", offline=source.on_disk) as engine:
            progress("starting the engine", 0, 1)
            start = Start(
                model=source.path,
                dtype=dtype,
                load_format=settings.load_format,
                batch_size=batch.requests,
                max_model_tokens=batch.tokens_per_request,
                max_step_tokens=min(widest, batch.step_tokens),
                kv_cache_bytes=kv_cache_bytes(source.shape, batch, dtype),
                enforce_eager=settings.enforce_eager,
                seed=settings.seed,
            )
            ready: Ready = start_together({engine: start})[engine]
            probes = []

            def probe() -> None:
                if settings.roofline:
                    progress("probing the machine", 0, 1)
                    probes.append(engine.probe(rows=min(batch.step_tokens, PROBE_ROWS)))

            probe()
            measured = run(engine, source)
            probe()
            peak_bytes = engine.peak_memory_bytes()
    rates = best_rates(probes)
    floors = None if rates is None else Floors(shape=source.shape, rates=rates, dtype_bytes=DTYPE_BYTES[dtype])
    common = {
        "date": date,
        "duration_s": time.monotonic() - begun_s,
        "machine": describe(),
        "rates": rates,
        "probes": tuple(probes),
        "model": source.name,
        "config_sha256": config_sha256(source.config),
        "shape": source.shape,
        "parameters": source.shape.parameters,
        "dtype": dtype,
        "start_s": ready.start_s,
        "peak_memory_bytes": peak_bytes,
        "gpu_memory_bytes": ready.gpu_memory_bytes,
    }
    return common, measured, floors


def _check(source: ModelSource, batch: Batch, dtype: str) -> None:
    check_context(source, batch.tokens_per_request)
    way_out = "Ask for smaller batches, cut the model with --layers N --load-format dummy, or free memory."
    needed_bytes = engine_memory_bytes(source.shape, batch, dtype)
    require_memory(f"an engine of {source.name}", needed_bytes, dtype=dtype, fix=way_out)
