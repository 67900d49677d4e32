"""The messages between a parent and its engine processes: JSON lines on two private pipes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pat_serve.scores import ScoreRequest, Scores
from pat_serve.server.analysis.trace import BatchTrace, RequestTrace
from pat_serve.server.engine.workers.probe import MachineRates


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Start(_Message):
    """The first command: start the engine. `Ready` or `Failed` answers it."""

    kind: Literal["start"] = "start"
    model: str
    dtype: str
    load_format: str
    batch_size: int
    max_model_tokens: int
    max_step_tokens: int
    kv_cache_bytes: int
    enforce_eager: bool
    read_prefix_cache: bool = False
    seed: int
    draft: str | None = None
    draft_tokens: int = 0


class Prefill(_Message):
    """Submit prompts of token ids, and step until each has its first token. `Stepped` or `Failed` answers it."""

    kind: Literal["prefill"] = "prefill"
    prompts: list[list[int]]
    output_tokens: int


class Decode(_Message):
    """Make some more steps with the submitted batch. `Stepped` or `Failed` answers it."""

    kind: Literal["decode"] = "decode"
    steps: int


class Probe(_Message):
    """Measure what the machine reads, and what it multiplies by so many rows. `Probed` or `Failed` answers it."""

    kind: Literal["probe"] = "probe"
    rows: int


class Score(_Message):
    """Judge prompts and continue others. `Scored` or `Failed` answers it."""

    kind: Literal["score"] = "score"
    request: ScoreRequest


class Serve(_Message):
    """Keep so many requests in flight until all prompts are answered. `Served` or `Failed` answers it."""

    kind: Literal["serve"] = "serve"
    prompts: list[list[int]]
    output_tokens: int
    concurrency: int


class Ready(_Message):
    """The engine can run. On a GPU it has made its widest step to find out what is left for the KV cache."""

    kind: Literal["ready"] = "ready"
    start_s: float
    peak_memory_bytes: int
    gpu_memory_bytes: int | None = None


class Stepped(_Message):
    """The steps are done; the batch's trace comes with its last one."""

    kind: Literal["stepped"] = "stepped"
    trace: BatchTrace | None


class Probed(_Message):
    """The rates that the probe has measured."""

    kind: Literal["probed"] = "probed"
    rates: MachineRates


class Scored(_Message):
    """The judgements of prompts, and the continuations."""

    kind: Literal["scored"] = "scored"
    scores: Scores


class Served(_Message):
    """All requests' timestamps and answers, in the order of their prompts."""

    kind: Literal["served"] = "served"
    requests: list[RequestTrace]
    token_ids: list[list[int]]


class Failed(_Message):
    """The command raised; the traceback is in the worker's log."""

    kind: Literal["failed"] = "failed"
    error: str


Command: TypeAdapter[Start | Prefill | Decode | Probe | Score | Serve] = TypeAdapter(
    Annotated[Start | Prefill | Decode | Probe | Score | Serve, Field(discriminator="kind")]
)
Reply: TypeAdapter[Ready | Stepped | Probed | Scored | Served | Failed] = TypeAdapter(
    Annotated[Ready | Stepped | Probed | Scored | Served | Failed, Field(discriminator="kind")]
)
