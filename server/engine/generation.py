"""A generation, apart from the engine that runs it: its settings, its pieces, its times."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rule for choosing the next token, and for stopping.

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
    """The times of a finished request on the engine's own clock, in seconds.

    Attributes:
        queue_s: from the request's entry into the queue until it was first scheduled.
        decode_s: from the request's first token until its last.
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
    """An engine, as far as a generation needs one."""

    def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Piece]:
        """Generate; closing the generator or cancelling its consumer aborts the request in the engine."""
        ...


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """A finished request's timestamps on the server's monotonic clock, and the engine's own measurements.

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
        """Time that the request waited in the engine's queue; None without the engine's statistics."""
        return self.engine.queue_s if self.engine else None

    @property
    def ttft_s(self) -> float | None:
        """Time from the request's arrival until its first token; None without tokens."""
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


class TimedGeneration:
    """One generation, with the moments at which its tokens arrive here.

    Args:
        engine: makes the tokens.
        prompt: its token ids.
        sampling: how to choose the tokens.
        arrival_s: when the caller's request came, on the monotonic clock; now unless given.
    """

    def __init__(
        self, engine: TokenEngine, prompt: Sequence[int], sampling: Sampling, *, arrival_s: float | None = None
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._sampling = sampling
        self._arrival_s = time.monotonic() if arrival_s is None else arrival_s
        # The time of each arrival, and the number of tokens that came with it.
        self._arrivals: list[tuple[float, int]] = []
        self._last: Piece | None = None

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The generation's pieces, recorded as they pass; raises as `TokenEngine.generate` does."""
        async with aclosing(self._engine.generate(self._prompt, self._sampling)) as pieces:
            async for piece in pieces:
                if piece.token_ids:
                    self._arrivals.append((time.monotonic(), len(piece.token_ids)))
                self._last = piece
                yield piece

    async def run(self) -> RequestTimes:
        """Generate to the end, and keep nothing but the times; raises as `TokenEngine.generate` does."""
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass
        return self.times()

    @property
    def finish_reason(self) -> str | None:
        """The reason for the generation's end; None while it runs, and where an engine that was shut down ended it."""
        return None if self._last is None else self._last.finish_reason

    @property
    def output_tokens(self) -> int:
        """Tokens that have arrived so far."""
        return sum(tokens for _, tokens in self._arrivals)

    def times(self) -> RequestTimes:
        """The times of the request, which ends now."""
        return RequestTimes(
            arrival_s=self._arrival_s,
            first_token_s=self._arrivals[0][0] if self._arrivals else None,
            end_s=time.monotonic(),
            output_tokens=self.output_tokens,
            engine=None if self._last is None else self._last.engine_times,
        )

    def token_times_s(self) -> list[float]:
        """The time at which each token came.

        Tokens that came together are spread evenly over the time since the token before them.
        """
        times_s: list[float] = []
        for at_s, tokens in self._arrivals:
            before_s = times_s[-1] if times_s else at_s
            times_s += [before_s + (at_s - before_s) * (i + 1) / tokens for i in range(tokens)]
        return times_s
