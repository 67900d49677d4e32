"""One request and its answer, as the outermost part of the server sees it; the parts behind it add what they learn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

# An answer that nobody was there to read; what access logs commonly show for it.
CLIENT_LEFT = 499
# Nobody has been asked who they are: an open path, a server without keys, or a request that was refused before.
NO_KEY = "none"


@dataclass(kw_only=True, slots=True)
class Exchange:
    """What is known of a request so far. Times are on the monotonic clock, in seconds; sizes in bytes.

    Attributes:
        route: template of the route, or one of the few other labels of `RouteNames`.
        request_id: the client's, if it may go into logs, or one of ours.
        key: name of the API key.
        status: of the answer; 0 while there is none.
        error: `error.type` of the answer, or of an error event in a stream.
        complete: the last byte of the answer has been handed over.
        closed: nothing of what comes now belongs to it.
        duration_s: from its arrival until its end, once it is closed.
        first_token_s: when the server held the first token of any of the request's sequences.
        queue_s: what the first of them to be scheduled had waited in the engine; None without engine statistics.
        decode_s: over all sequences, from the first token to the last.
        decoded_tokens: over all sequences, those that came after the first.
        open_sequences: those that an engine works on, by id, each with what is to be called when nobody waits for it.
    """

    method: str
    path: str
    route: str
    request_id: str
    arrival_s: float = field(default_factory=time.monotonic)
    key: str = NO_KEY
    status: int = 0
    error: str | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    complete: bool = False
    closed: bool = False
    duration_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    queue_s: float | None = None
    decode_s: float = 0.0
    decoded_tokens: int = 0
    open_sequences: dict[str, Callable[[str], None]] = field(default_factory=dict)

    def close(self) -> None:
        """Its answer has ended, or the client has left."""
        self.duration_s = time.monotonic() - self.arrival_s
        self.closed = True
        # An engine may have dropped some unheard.
        for request_id, end in tuple(self.open_sequences.items()):
            end(request_id)

    @property
    def ttft_s(self) -> float | None:
        """From the request's arrival until its first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after a sequence's first; None without any."""
        return self.decode_s / self.decoded_tokens if self.decoded_tokens else None


# Of the task that answers a request, and of all tasks that it starts: vLLM's are told nothing of HTTP.
current: ContextVar[Exchange | None] = ContextVar("pat_serve_exchange", default=None)
