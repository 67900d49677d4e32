"""`POST /benchmark/latency` and `/benchmark/throughput`: one at a time, bounded, cancelled when nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import Request

from pat_serve.server.connection import while_connected
from pat_serve.server.engine import Engine
from pat_serve.server.generation import RequestTimes
from pat_serve.server.http_errors import HttpError, InvalidRequestError
from pat_serve.server.limits import BENCHMARK_TIMEOUT_S, LimitError, check_benchmark
from pat_serve.server.measure import Run, Shape, measure_latency, measure_throughput
from pat_serve.server.readiness import Readiness
from pat_serve.server.schemas import (
    LatencyRequest,
    LatencyResponse,
    LatencySummary,
    RequestFigures,
    RoundFigures,
    SummaryBody,
    ThroughputRequest,
    ThroughputResponse,
    ThroughputSummary,
)
from pat_serve.server.statistics import summarize

T = TypeVar("T")


async def latency(
    engine: Engine, readiness: Readiness, lock: asyncio.Lock, body: LatencyRequest, http: Request
) -> LatencyResponse:
    """Run the latency benchmark.

    Raises:
        HttpError: 400 the requests do not fit the model, 409 another benchmark runs, 503 it took too long.
        ClientGoneError: the client left; nothing of the benchmark runs on.
    """
    work = measure_latency(
        engine,
        _shape(engine, body),
        batch_size=body.batch_size,
        rounds=body.rounds,
        warmup=body.warmup,
        seed=body.seed,
        on_token=readiness.note_token,
    )
    runs = await _alone(lock, http, work)
    requests = [times for run in runs for times in run.requests]
    return LatencyResponse(
        model=engine.model_name,
        settings=body,
        rounds=[
            RoundFigures(
                duration_s=run.duration_s,
                output_tokens_per_s=run.output_tokens_per_s,
                requests_per_s=run.requests_per_s,
                requests=_figures(run),
            )
            for run in runs
        ],
        summary=LatencySummary(
            **_latencies(requests),
            output_tokens_per_s=_summary([run.output_tokens_per_s for run in runs]),
            requests_per_s=_summary([run.requests_per_s for run in runs]),
        ),
    )


async def throughput(
    engine: Engine, readiness: Readiness, lock: asyncio.Lock, body: ThroughputRequest, http: Request
) -> ThroughputResponse:
    """Run the throughput benchmark.

    Raises:
        HttpError: 400 the requests do not fit the model, 409 another benchmark runs, 503 it took too long.
        ClientGoneError: the client left; nothing of the benchmark runs on.
    """
    work = measure_throughput(
        engine,
        _shape(engine, body),
        concurrency=body.concurrency,
        num_requests=body.num_requests,
        duration_s=body.duration_s,
        warmup=body.warmup,
        seed=body.seed,
        on_token=readiness.note_token,
    )
    run = await _alone(lock, http, work)
    tokens = run.output_tokens + body.prompt_tokens * len(run.requests)
    return ThroughputResponse(
        model=engine.model_name,
        settings=body,
        duration_s=run.duration_s,
        requests=_figures(run),
        summary=ThroughputSummary(
            **_latencies(run.requests),
            output_tokens_per_s=run.output_tokens_per_s,
            total_tokens_per_s=tokens / run.duration_s,
            requests_per_s=run.requests_per_s,
        ),
    )


def _shape(engine: Engine, body: LatencyRequest | ThroughputRequest) -> Shape:
    try:
        check_benchmark(body.prompt_tokens, body.output_tokens, max_model_len=engine.max_model_len)
    except LimitError as error:
        raise InvalidRequestError(str(error), error.param) from error
    return Shape(prompt_tokens=body.prompt_tokens, output_tokens=body.output_tokens, vocab_size=engine.vocab_size)


async def _alone(lock: asyncio.Lock, http: Request, work: Coroutine[Any, Any, T]) -> T:
    if lock.locked():
        work.close()
        raise HttpError(409, "busy", "another benchmark is running; two at once would measure each other")
    async with lock:
        try:
            async with asyncio.timeout(BENCHMARK_TIMEOUT_S):
                return await while_connected(http, work)
        except TimeoutError:
            message = f"the benchmark took longer than {BENCHMARK_TIMEOUT_S:g} s and was stopped; ask for less"
            raise HttpError(503, "benchmark_timeout", message) from None


def _figures(run: Run) -> list[RequestFigures]:
    return [
        RequestFigures(
            start_s=times.arrival_s - run.start_s,
            output_tokens=times.output_tokens,
            queue_s=times.queue_s,
            ttft_s=times.ttft_s,
            tpot_s=times.tpot_s,
            e2e_s=times.e2e_s,
        )
        for times in run.requests
    ]


def _latencies(requests: Sequence[RequestTimes]) -> dict[str, Any]:
    tpots = [times.tpot_s for times in requests if times.tpot_s is not None]
    return {
        "ttft_s": _summary([times.ttft_s for times in requests if times.ttft_s is not None]),
        "tpot_s": _summary(tpots) if tpots else None,
        "e2e_s": _summary([times.e2e_s for times in requests]),
    }


def _summary(samples: Sequence[float]) -> SummaryBody:
    return SummaryBody(**asdict(summarize(samples)))
