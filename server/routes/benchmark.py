"""`POST /benchmark/latency` and `/benchmark/throughput`: one at a time, bounded, cancelled when nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Request

from pat_serve.server.analysis.statistics import median_interval, percentile, summarize
from pat_serve.server.engine.generation import RequestTimes
from pat_serve.server.engine.online import Engine
from pat_serve.server.http.errors import InvalidRequestError
from pat_serve.server.http.limits import LimitError, check_benchmark
from pat_serve.server.routes.benchmark_roofline import roofline
from pat_serve.server.routes.benchmark_schemas import (
    LatencyRequest,
    LatencyResponse,
    LatencySummary,
    RequestFigures,
    RooflineBody,
    RoundFigures,
    SummaryBody,
    ThroughputRequest,
    ThroughputResponse,
    ThroughputSummary,
)
from pat_serve.server.routes.exclusive import Exclusive
from pat_serve.server.routes.measure import Run, Shape, measure_latency, measure_throughput


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One request for a benchmark.

    Both benchmarks raise:
        HttpError: 400 the requests do not fit the model or the queue, 409 another benchmark runs or users are being
            served, 503 the queue has no room now or it took too long.
        ClientGoneError: the client left; nothing of the benchmark runs on.

    Attributes:
        engine: the engine to measure.
        baseline: the dense parent's engine, if there is one, for the ceilings.
        exclusive: lets one benchmark run at a time.
        http: the request, whose client may leave.
    """

    engine: Engine
    baseline: Engine | None
    exclusive: Exclusive
    http: Request

    async def latency(self, body: LatencyRequest) -> LatencyResponse:
        """Time batches, one after the other."""
        work = measure_latency(
            self.engine,
            self._shape(body, body.batch_size),
            batch_size=body.batch_size,
            rounds=body.rounds,
            warmup=body.warmup,
            seed=body.seed,
        )
        runs, others = await self.exclusive.run(self.http, work, sequences=body.batch_size, force=body.force)
        groups = [run.requests for run in runs]
        latencies = await asyncio.to_thread(_latencies, groups)
        tpot: SummaryBody | None = latencies["tpot_s"]
        return LatencyResponse(
            model=self.engine.model_name,
            settings=body,
            other_requests=others,
            roofline=self._roofline(
                body,
                body.batch_size,
                prefill_s=percentile([max(times.ttft_s or 0.0 for times in group) for group in groups], 50),
                decode_step_s=None if tpot is None else tpot.median,
            ),
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
                **latencies,
                output_tokens_per_s=_summary([[run.output_tokens_per_s] for run in runs]),
                requests_per_s=_summary([[run.requests_per_s] for run in runs]),
            ),
        )

    async def throughput(self, body: ThroughputRequest) -> ThroughputResponse:
        """Keep a number of requests under way, and count what comes out."""
        work = measure_throughput(
            self.engine,
            self._shape(body, body.concurrency),
            concurrency=body.concurrency,
            num_requests=body.num_requests,
            duration_s=body.duration_s,
            warmup=body.warmup,
            seed=body.seed,
        )
        run, others = await self.exclusive.run(self.http, work, sequences=body.concurrency, force=body.force)
        tokens = run.output_tokens + body.prompt_tokens * len(run.requests)
        return ThroughputResponse(
            model=self.engine.model_name,
            settings=body,
            other_requests=others,
            roofline=self._roofline(body, body.concurrency),
            duration_s=run.duration_s,
            requests=_figures(run),
            summary=ThroughputSummary(
                **await asyncio.to_thread(_latencies, [[times] for times in run.requests]),
                output_tokens_per_s=run.output_tokens_per_s,
                total_tokens_per_s=tokens / run.duration_s,
                requests_per_s=run.requests_per_s,
            ),
        )

    def _shape(self, body: LatencyRequest | ThroughputRequest, at_once: int) -> Shape:
        prompt, output, engine = body.prompt_tokens, body.output_tokens, self.engine
        try:
            check_benchmark(prompt, output, at_once=at_once, max_model_len=engine.max_model_len)
        except LimitError as error:
            raise InvalidRequestError(str(error), error.param) from error
        return Shape(prompt_tokens=prompt, output_tokens=output, vocab_size=engine.vocab_size)

    def _roofline(
        self, body: LatencyRequest | ThroughputRequest, at_once: int, **measured: float | None
    ) -> RooflineBody | None:
        return roofline(
            self.engine,
            self.baseline,
            batch_size=at_once,
            prompt_tokens=body.prompt_tokens,
            output_tokens=body.output_tokens,
            **measured,
        )


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


def _latencies(groups: Sequence[Sequence[RequestTimes]]) -> dict[str, Any]:
    """Summaries of all requests; the requests of a group ran together."""
    tpots = [[times.tpot_s for times in group if times.tpot_s is not None] for group in groups]
    return {
        "ttft_s": _summary([[times.ttft_s for times in group if times.ttft_s is not None] for group in groups]),
        "tpot_s": _summary(tpots) if any(tpots) else None,
        "e2e_s": _summary([[times.e2e_s for times in group] for group in groups]),
    }


def _summary(groups: Sequence[Sequence[float]]) -> SummaryBody:
    interval = median_interval(groups)
    return SummaryBody(
        **asdict(summarize([sample for group in groups for sample in group])),
        median_low=interval.low,
        median_high=interval.high,
        confidence=interval.confidence,
    )
