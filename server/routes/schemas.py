"""The HTTP contract: what our routes take and give. Times are in seconds; an unknown field is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue

from pat_serve.server.http.limits import (
    MAX_MESSAGES,
    MAX_MODEL_TOKENS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TEMPERATURE,
)


class Body(BaseModel):
    """The body of a request: strict types, finite numbers, and no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def exactly_one(*names: str) -> JsonDict:
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

    model_config = ConfigDict(json_schema_extra=exactly_one("prompt", "prompt_token_ids", "messages"))

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
