"""Bounds on reading a request: its headers, its size, the time that it takes to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope

from pat_serve.server.http.body_check import valid_request_id
from pat_serve.server.http.errors import RETRY_AFTER_S, HttpError, InvalidRequestError
from pat_serve.server.http.policy import MAX_HEADER_BYTES, MAX_HEADERS, MAX_REQUEST_ID_CHARS, MAX_URL_BYTES

# The rest of a body that nobody wants would otherwise be read for as long as the client sends it.
_CLOSE = {"Connection": "close"}


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of a name, which is given in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


def check_headers(scope: Scope) -> None:
    """Refuse a URL or headers that are too large or too many, or a request id that does not belong into logs.

    Raises:
        HttpError: 414 the URL is too long, 431 the headers are too large, 400 the request id is not valid.
    """
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
        raise HttpError(414, "url_too_long", f"at most {MAX_URL_BYTES} bytes of URL are allowed", headers=_CLOSE)
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        told = f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together are allowed"
        raise HttpError(431, "headers_too_large", told, headers=_CLOSE)
    request_id = header(scope, b"x-request-id")
    if request_id is not None and not valid_request_id(request_id.decode("latin-1")):
        told = f"X-Request-Id: must be 1 to {MAX_REQUEST_ID_CHARS} letters, digits and ._:-"
        raise HttpError(400, "invalid_request", told, headers=_CLOSE)


class BodyBudget:
    """A budget for the bytes of all bodies, each held until its answer has ended. Lives on the event loop.

    Args:
        capacity: bytes that all bodies together may have.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """The share of one request: a function that takes each further number of bytes, or raises 503 without room."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self.held + size > self.capacity:
                headers = _CLOSE | {"Retry-After": str(RETRY_AFTER_S)}
                raise HttpError(503, "overloaded", "too many bodies are under way; try again later", headers=headers)
            self.held += size
            taken += size

        try:
            yield take
        finally:
            self.held -= taken


async def read_body(
    scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float, take: Callable[[int], None]
) -> bytes | None:
    """The whole body; None if the client left before its end.

    Args:
        scope: the request's scope.
        receive: gives the request's messages.
        max_bytes: size that the body may have; 0 for a request that takes none.
        timeout_s: time that the body may take to arrive.
        take: is called with the size of each piece before it is kept; see `BodyBudget.share`.

    Raises:
        HttpError: 413 the body is too large, whatever length was announced; 408 it takes too long; 503 there is no room
            for it.
    """
    told = header(scope, b"content-length")
    if told is None and header(scope, b"transfer-encoding") is None:
        return b""
    bound = f"the body is larger than {max_bytes} bytes" if max_bytes else "this request takes no body; leave it out"
    too_large = HttpError(413, "body_too_large", bound, headers=_CLOSE)
    # The parser has made sure that a length is digits.
    if told is not None and int(told) > max_bytes:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                take(len(chunk))
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise HttpError(408, "body_timeout", f"the body took longer than {timeout_s:g} s", headers=_CLOSE) from None


def check_length(scope: Scope, body: bytes) -> None:
    """Refuse a body that is shorter or longer than was announced.

    Raises:
        InvalidRequestError: the body has another length than Content-Length says.
    """
    told = header(scope, b"content-length")
    if told is not None and header(scope, b"transfer-encoding") is None and int(told) != len(body):
        raise InvalidRequestError("the body does not have the length that Content-Length says")


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, then the messages of the connection."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again
