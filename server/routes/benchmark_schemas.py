"""Bodies and answers of the routes under `/benchmark/`. Times are in seconds; an unknown field is an error."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pat_serve.server.http.limits import MAX_BATCH_SIZE, MAX_DURATION_S, MAX_REQUESTS, MAX_ROUNDS, MAX_WARMUP
from pat_serve.server.routes.schemas import Body, Seed, Timings, TokenCount, exactly_one


class LatencyRequest(Body):
    """`POST /benchmark/latency`: rounds of one batch each, sent together, the next when all have finished."""

    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 1
    prompt_tokens: TokenCount = 128
    output_tokens: TokenCount = 64
    rounds: Annotated[int, Field(ge=1, le=MAX_ROUNDS)] = 5
    warmup: Annotated[int, Field(ge=0, le=MAX_WARMUP, description="Rounds before the timed ones.")] = 1
    seed: Seed = 0
    force: Annotated[bool, Field(description="Run also while users are being served.")] = False


class ThroughputRequest(Body):
    """`POST /benchmark/throughput`: `concurrency` clients, each sending its next request when the last has finished.

    Exactly one of `num_requests` and `duration_s` is given. After `duration_s` no request is started, and the requests
    under way finish.
    """

    model_config = ConfigDict(json_schema_extra=exactly_one("num_requests", "duration_s"))

    concurrency: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 4
    num_requests: Annotated[int | None, Field(ge=1, le=MAX_REQUESTS)] = None
    duration_s: Annotated[float | None, Field(gt=0, le=MAX_DURATION_S)] = None
    prompt_tokens: TokenCount = 128
    output_tokens: TokenCount = 64
    warmup: Annotated[int, Field(ge=0, le=MAX_WARMUP, description="Rounds of `concurrency` requests.")] = 1
    seed: Seed = 0
    force: Annotated[bool, Field(description="Run also while users are being served.")] = False

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_requests is None) == (self.duration_s is None):
            raise ValueError("give exactly one of num_requests and duration_s")
        return self


class SummaryBody(BaseModel):
    """Statistics of a list of figures; `median_low` to `median_high` is the bootstrap interval of the median."""

    count: int
    mean: float
    median: float
    median_low: float
    median_high: float
    confidence: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float


class RequestFigures(Timings):
    """One request of a benchmark; `start_s` counts from the first timed request."""

    start_s: float
    output_tokens: int


class RoundFigures(BaseModel):
    """One round of the latency benchmark; `duration_s` is from sending the batch until its last token."""

    duration_s: float
    output_tokens_per_s: float
    requests_per_s: float
    requests: list[RequestFigures]


class PrefillRoofline(BaseModel):
    """FLOPs until the whole batch has its first tokens, and the most that a pruned model can gain on its baseline.

    `achieved_flops_per_s` is null in the throughput benchmark, where prefill and decode mix.
    """

    prompt_tokens: int
    flops: float
    achieved_flops_per_s: float | None
    speedup_ceiling: float | None


class DecodeRoofline(BaseModel):
    """Bytes that a decode step of the whole batch reads, and the most that a pruned model can gain on its baseline."""

    context_tokens: float
    bytes_per_step: float
    achieved_bytes_per_s: float | None
    speedup_ceiling: float | None


class RooflineBody(BaseModel):
    """Work counted from the model's config for this batch and context; the ceilings are null without a baseline."""

    batch_size: int
    dtype: str
    prefill: PrefillRoofline
    decode: DecodeRoofline


class LatencySummary(BaseModel):
    """Figures over all timed requests (the three latencies) and over all rounds (the two rates)."""

    ttft_s: SummaryBody
    tpot_s: SummaryBody | None
    e2e_s: SummaryBody
    output_tokens_per_s: SummaryBody
    requests_per_s: SummaryBody


class LatencyResponse(BaseModel):
    """The answer of `POST /benchmark/latency`; `other_requests` of users ran meanwhile."""

    model: str
    settings: LatencyRequest
    other_requests: int
    roofline: RooflineBody | None
    rounds: list[RoundFigures]
    summary: LatencySummary


class ThroughputSummary(BaseModel):
    """Figures over all timed requests; the rates are totals divided by `duration_s`."""

    ttft_s: SummaryBody
    tpot_s: SummaryBody | None
    e2e_s: SummaryBody
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float


class ThroughputResponse(BaseModel):
    """The answer of `POST /benchmark/throughput`; `other_requests` of users ran meanwhile."""

    model: str
    settings: ThroughputRequest
    other_requests: int
    roofline: RooflineBody | None
    duration_s: float
    requests: list[RequestFigures]
    summary: ThroughputSummary
