"""Every bound of a request, in one place. docs/serving.md lists them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pat_serve.server.http.keys import KeyRing
from pat_serve.server.http.web_page import PAGE_PATHS

MIB = 2**20

# No client or proxy sends more. uvicorn's parser itself has no bound.
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
MAX_URL_BYTES = 8 * 1024
MAX_REQUEST_ID_CHARS = 128


class Feature(StrEnum):
    """A feature that a request may ask for only if the operator allows it.

    Each feature makes the server run what the client wrote: a grammar's compiler, a template engine, a fetch from the
    server's network, the model without its embedding.
    """

    STRUCTURED_OUTPUT = "structured-output"
    CHAT_TEMPLATE = "chat-template"
    MEDIA = "media"
    PROMPT_EMBEDS = "prompt-embeds"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Bounds of the HTTP side.

    Attributes:
        keys: the API keys that open the server.
        public_metrics: `/metrics` asks for no key.
        public_page: the page's files ask for no key; what it shows still does.
        max_body_bytes: size of a request's body.
        max_bodies_bytes: size of all bodies that are held at once; one body of the largest size always has room.
        max_sequences: prompts times `n` of one request.
        max_queue: sequences that wait beyond those that the engine runs at once; None is four times those.
        max_concurrency_per_key: requests of one key under way; None is unbounded.
        request_timeout_s: time from a complete body to the end of the answer.
        receive_timeout_s: time for a request's headers, and again for its body.
        send_timeout_s: time for a client that has stopped reading to begin again.
        max_connections: connections that are open at once.
        shutdown_timeout_s: time that requests under way may take after SIGTERM.
        allowed: the features that a request may ask for.
        benchmarks: `/benchmark/*` measures when it is asked to.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    public_metrics: bool = False
    public_page: bool = False
    max_body_bytes: int = 4 * MIB
    max_bodies_bytes: int = 256 * MIB
    max_sequences: int = 128
    max_queue: int | None = None
    max_concurrency_per_key: int | None = None
    request_timeout_s: float = 600.0
    receive_timeout_s: float = 20.0
    send_timeout_s: float = 60.0
    max_connections: int = 2048
    shutdown_timeout_s: float = 30.0
    allowed: frozenset[Feature] = frozenset()
    benchmarks: bool = True

    @property
    def open_paths(self) -> frozenset[str]:
        """Paths that ask for no key: exactly these, whatever else a path may look like."""
        metrics = {"/metrics"} if self.public_metrics else set()
        return frozenset({"/health", "/ready"} | metrics) | (PAGE_PATHS if self.public_page else frozenset())
