"""The HTTP contract: what our routes take and give. Times are in seconds; an unknown field is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue

from pat_serve.server.http.limits import (
    MAX_BATCH_SIZE,
    MAX_DURATION_S,
    MAX_MESSAGES,
    MAX_MODEL_TOKENS,
    MAX_PROMPT_CHARS,
    MAX_REQUESTS,
    MAX_ROUNDS,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_WARMUP,
)


class Body(BaseModel):
    """The body of a request: strict types, finite numbers, and no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _exactly_one(*names: str) -> JsonDict:
    """Tell the OpenAPI document that exactly one of these fields is there and not null."""

    def given(name: str) -> JsonValue:
        others: dict[str, JsonValue] = {other: {"type": "null"} for other in names if other != name}
        return {"required": [name], "properties": {name: {"not": {"type": "null"}}, **others}}

    return {"oneOf": [given(name) for name in names]}


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_MODEL_TOKENS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Message(Body):
    """One turn of a conversation. The model's chat template decides how its role is written."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]


class GenerateRequest(Body):
    """`POST /generate`: exactly one of `prompt`, `prompt_token_ids` and `messages`, and how to sample."""

    model_config = ConfigDict(json_schema_extra=_exactly_one("prompt", "prompt_token_ids", "messages"))

    prompt: Annotated[str | None, Field(min_length=1, max_length=MAX_PROMPT_CHARS)] = None
    # The first wrong item is enough, because a long list of wrong items would make an error of each.
    prompt_token_ids: Annotated[
        list[TokenId] | None, Field(min_length=1, max_length=MAX_MODEL_TOKENS, fail_fast=True)
    ] = None
    messages: Annotated[
        list[Message] | None,
        Field(
            min_length=1,
            max_length=MAX_MESSAGES,
            fail_fast=True,
            description="A conversation, written as the model's chat template has it; the answer is its next turn.",
        ),
    ] = None
    max_tokens: Annotated[
        TokenCount | None, Field(description="Default: as many as the model's length leaves, at most 256.")
    ] = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, description="0 is greedy.")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MAX_MODEL_TOKENS, description="0 keeps all tokens.")] = 0
    stop: Annotated[
        list[StopString],
        BeforeValidator(
            _as_list, json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
        ),
        Field(max_length=MAX_STOPS),
    ] = []
    seed: Seed | None = None
    ignore_eos: bool = False
    stream: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.prompt_token_ids, self.messages)) != 1:
            raise ValueError("give exactly one of prompt, prompt_token_ids and messages")
        return self


class Usage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """Where one request's time went, in seconds.

    Attributes:
        queue_s: waiting in the engine before the request was first scheduled; null if the engine keeps no statistics.
        ttft_s: from the request's arrival until the server held its first token; null if there was none.
        tpot_s: mean time per output token after the first; null with fewer than two tokens.
        e2e_s: from the request's arrival until its last token.
    """

    queue_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float


class GenerateResponse(BaseModel):
    """The answer of `POST /generate` without `stream`."""

    id: str
    model: str
    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    timings: Timings


class StreamDelta(BaseModel):
    """An event of a stream: the text and the tokens since the last event."""

    id: str
    text: str
    token_ids: list[int]


class StreamEnd(BaseModel):
    """The last event of a stream, before `data: [DONE]`."""

    id: str
    finish_reason: str
    usage: Usage
    timings: Timings


class HealthResponse(BaseModel):
    """`GET /health`: the process is alive. `GET /ready` says whether the engine answers."""

    status: str
    version: str


class ReadyResponse(BaseModel):
    """`GET /ready`: the engine has produced a token lately."""

    status: str
    model: str
    last_token_age_s: float


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

    model_config = ConfigDict(json_schema_extra=_exactly_one("num_requests", "duration_s"))

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
