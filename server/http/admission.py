"""Admission to the engine: a bounded number of sequences, and a bounded number of requests for each key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pat_serve.server.http.errors import RETRY_AFTER_S, HttpError, InvalidRequestError

# A server that is stopping will not take requests again; after so many seconds another instance may have its place.
RETRY_AFTER_STOP_S = 5


class Admission:
    """Counts the requests under way. Lives on the event loop; only `draining` is set from elsewhere.

    A request beyond the bound is refused at once, before the engine hears of it: a client that would wait too long is
    better told so.

    Args:
        capacity: sequences that run or wait in the engine.
        per_key: requests of one key; None is unbounded.
    """

    def __init__(self, *, capacity: int, per_key: int | None = None) -> None:
        self.capacity = capacity
        self.per_key = per_key
        self.draining = False
        self.sequences = 0
        self.requests = 0
        # Requests whose routes have not ended; one that has its whole answer holds no place any more.
        self.unfinished = 0
        # All requests since the start.
        self.admitted = 0
        self._by_key: Counter[str] = Counter()
        # Called whenever a place was taken or given back.
        self.changed: Callable[[], None] = lambda: None

    @contextmanager
    def admit(self, key: str, sequences: int) -> Iterator[Callable[[], None]]:
        """Hold a place for a request.

        Yields:
            What gives the place back before the request has ended, so that the next request of a client that has its
            whole answer finds it free. The request counts as unfinished until it has ended.

        Raises:
            HttpError: 503 the server stops or its queue is full, 429 the key has too many requests under way.
            InvalidRequestError: the request alone is more than the server ever takes.
        """
        if self.draining:
            raise HttpError(
                503,
                "stopping",
                "the server is stopping; ask another or try again later",
                headers={"Retry-After": str(RETRY_AFTER_STOP_S), "Connection": "close"},
            )
        self._check_size(sequences, "prompts times n")
        if self.per_key is not None and self._by_key[key] >= self.per_key:
            raise HttpError(
                429,
                "too_many_requests",
                f"this key has {self.per_key} requests under way, which is its bound",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        self._check_room(sequences)
        self.sequences += sequences
        self.requests += 1
        self.unfinished += 1
        self.admitted += 1
        self._by_key[key] += 1
        self.changed()
        held = True

        def give_back() -> None:
            nonlocal held
            if not held:
                return
            held = False
            self.sequences -= sequences
            self.requests -= 1
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]
            self.changed()

        try:
            yield give_back
        finally:
            self.unfinished -= 1
            give_back()

    @contextmanager
    def more(self, sequences: int) -> Iterator[None]:
        """Hold further places for a request that was admitted with one, and that turns out to need more.

        Raises:
            HttpError: 503 the queue has no room for them.
            InvalidRequestError: they are more than the server ever takes.
        """
        self._check_size(sequences + 1, "requests at once")
        self._check_room(sequences)
        self.sequences += sequences
        self.changed()
        try:
            yield
        finally:
            self.sequences -= sequences
            self.changed()

    def _check_size(self, sequences: int, of: str) -> None:
        if sequences > self.capacity:
            told = f"the request asks for {sequences} sequences ({of}), and this server holds {self.capacity}"
            raise InvalidRequestError(f"{told}; ask for less")

    def _check_room(self, sequences: int) -> None:
        if self.sequences + sequences > self.capacity:
            raise HttpError(
                503, "overloaded", "the queue is full; try again later", headers={"Retry-After": str(RETRY_AFTER_S)}
            )
