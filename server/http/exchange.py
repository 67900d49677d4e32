"""One request and its answer, as the outermost part of the server sees it; the parts behind it add what they learn."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from pat_serve.server.engine.token_watch import RequestWork

# The status of an answer that nobody was there to read; access logs commonly show this number for it.
CLIENT_LEFT = 499
# The name of the key where nobody was asked for one: an open path, a server without keys, a request refused before.
NO_KEY = "none"


@dataclass(kw_only=True, slots=True)
class Exchange:
    """A request and what is known of it so far. Times are on the monotonic clock, in seconds; sizes in bytes.

    Attributes:
        route: template of the route, or one of the few other labels of `RouteNames`.
        request_id: the client's, if it may go into logs, or one of ours.
        key: name of the API key.
        status: HTTP status of the answer; 0 while there is none.
        error: `error.type` of the answer, or of an error event in a stream.
        complete: the last byte of the answer has been handed over.
        duration_s: from the request's arrival until its end, once the exchange is closed.
        work: the work of engines for this request.
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
    duration_s: float = 0.0
    work: RequestWork = field(default_factory=RequestWork)

    def close(self) -> None:
        """End the exchange: its answer has ended, or the client has left."""
        self.duration_s = time.monotonic() - self.arrival_s
        self.work.close()

    @property
    def closed(self) -> bool:
        """Whether the exchange has ended; nothing that comes later belongs to it."""
        return self.work.closed

    @property
    def ttft_s(self) -> float | None:
        """Time from the request's arrival until its first token."""
        return None if self.work.first_token_s is None else self.work.first_token_s - self.arrival_s


# The exchange whose request the current task answers.
current: ContextVar[Exchange | None] = ContextVar("pat_serve_exchange", default=None)
