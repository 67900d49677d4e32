"""Reading a request within bounds: its headers, its size, the time that it takes to arrive."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope

from pat_serve.server.http.body_check import valid_request_id
from pat_serve.server.http.errors import HttpError, InvalidRequestError
from pat_serve.server.policy import MAX_HEADER_BYTES, MAX_HEADERS, MAX_REQUEST_ID_CHARS, MAX_URL_BYTES, Policy

# What is left of a body that nobody wants would be read for as long as the client sends it.
_CLOSE = {"Connection": "close"}


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that name, which is in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


def check_headers(scope: Scope) -> None:
    """Refuse a URL or headers that are too large or too many, or a request id that does not belong into logs.

    Raises:
        HttpError: 414, 431 or 400.
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


async def read_body(scope: Scope, receive: Receive, policy: Policy) -> bytes | None:
    """The whole body; None if the client left before its end.

    Raises:
        HttpError: 413 it is too large, whatever its length was said to be; 408 it takes too long; 400 a wrong length.
    """
    told = header(scope, b"content-length")
    if told is None and header(scope, b"transfer-encoding") is None:
        return b""
    too_large = HttpError(
        413, "body_too_large", f"the body is larger than {policy.max_body_bytes} bytes", headers=_CLOSE
    )
    # The parser has seen to it that a length is digits.
    if told is not None and int(told) > policy.max_body_bytes:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(policy.receive_timeout_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                chunk = message.get("body", b"")
                chunks.append(chunk)
                size += len(chunk)
                if size > policy.max_body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        told_late = f"the body took longer than {policy.receive_timeout_s:g} s"
        raise HttpError(408, "body_timeout", told_late, headers=_CLOSE) from None


def check_length(scope: Scope, body: bytes) -> None:
    """Refuse a body that is shorter or longer than was said.

    Raises:
        InvalidRequestError: it is.
    """
    told = header(scope, b"content-length")
    if told is not None and header(scope, b"transfer-encoding") is None and int(told) != len(body):
        raise InvalidRequestError("the body does not have the length that Content-Length says")


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, then what the connection says."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again
