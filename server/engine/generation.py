"""What a generation is, apart from the engine that runs it: its settings, its pieces, its times."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token, and when to stop.

    Attributes:
        max_tokens: tokens to generate at most.
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        ignore_eos: go on after the end-of-sequence token, so that the number of tokens is known beforehand.
        read_prefix_cache: reuse the keys and values of an equal earlier prompt; off where prefill is measured.
        detokenize: make text of the tokens; needed for `stop`.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    read_prefix_cache: bool = True
    detokenize: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """What the engine's own clock says about a finished request, in seconds.

    Attributes:
        queue_s: from its entry into the queue until it was first scheduled.
        decode_s: from its first token until its last.
    """

    queue_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One or more new tokens of a generation; the last piece says why it ended."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    engine_times: EngineTimes | None = None


class TokenEngine(Protocol):
    """What a generation needs of an engine."""

    def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Piece]:
        """Generate; closing the generator or cancelling its consumer aborts the request in the engine."""
        ...


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """A finished request's timestamps on the server's monotonic clock, and what the engine measured itself.

    The engine's clock is preferred where it sees more: queueing, and the pace of decoding without the jitter of the
    event loop. First token and end are what a caller experiences, so tokenisation and hand-over belong to them.
    """

    arrival_s: float
    first_token_s: float | None
    end_s: float
    output_tokens: int
    engine: EngineTimes | None

    @property
    def queue_s(self) -> float | None:
        """Time in the engine's queue."""
        return self.engine.queue_s if self.engine else None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        if self.first_token_s is None or self.output_tokens < 2:
            return None
        decode_s = self.engine.decode_s if self.engine else self.end_s - self.first_token_s
        return decode_s / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Time from arrival to the last token."""
        return self.end_s - self.arrival_s
