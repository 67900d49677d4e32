"""The relay hands a request on to the server of this replica, and the answer back, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from urllib.parse import quote

import httpx
from starlette.types import Receive, Scope, Send

from pat_serve.server.cluster.events import WholeEvents, error_event, is_event_stream
from pat_serve.server.cluster.repeat import replica_lost

_CONNECT_S = 10.0
# The relay gives up an idle connection sooner than the server, which may do so after vLLM's own 5 s
# (VLLM_HTTP_TIMEOUT_KEEP_ALIVE).
_KEEP_ALIVE_S = 2.0
# These headers are about a connection, not about a message. Ray Serve answers with the request's id itself.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)


class Relay:
    """An ASGI application whose answers are those of another server.

    Answers of the server pass unchanged: keys, bounds and deadlines are the server's own. When the server is lost,
    clients get 503 with Retry-After, or an error event at the end of their stream. Cancelling the call, which is what
    Ray Serve does when the client leaves, closes the connection, and the server stops the work.

    Args:
        url: address of the server, without a path.
    """

    def __init__(self, url: str) -> None:
        self._url = httpx.URL(url)
        # The server itself bounds the time of an answer.
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        # A proxy that the environment names is not used: the server is on this machine.
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    async def ready(self, timeout_s: float) -> bool:
        """Whether the server's engine answers."""
        try:
            answer = await self._client.get(self._url.copy_with(path="/ready"), timeout=timeout_s)
        except httpx.TransportError:
            return False
        return answer.status_code == httpx.codes.OK

    async def aclose(self) -> None:
        """Close the connections to the server."""
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with the server's answer."""
        request = httpx.Request(
            scope["method"],
            self._url.copy_with(raw_path=_target(scope)),
            headers=[(name, value) for name, value in scope["headers"] if name.lower() not in _HOP_BY_HOP],
            content=_body(receive) if _has_body(scope) else None,
            extensions={"timeout": self._client.timeout.as_dict()},
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.TransportError:
            await replica_lost().response()(scope, receive, send)
            return
        try:
            if is_event_stream(answer.headers.raw):
                await _stream(answer, send)
            else:
                await _whole(answer, scope, receive, send)
        finally:
            # The answer is closed also for a call that is being cancelled: the server must hear at once that nobody
            # waits.
            with suppress(httpx.TransportError):
                await asyncio.shield(answer.aclose())


async def _stream(answer: httpx.Response, send: Send) -> None:
    await _start(answer, send)
    events = WholeEvents()
    try:
        async for chunk in answer.aiter_raw():
            whole = events.feed(chunk)
            if whole:
                await send({"type": "http.response.body", "body": whole, "more_body": True})
        last = events.rest()
    except httpx.TransportError:
        last = error_event(replica_lost())
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _whole(answer: httpx.Response, scope: Scope, receive: Receive, send: Send) -> None:
    # The answer is read in one piece. Nothing is sent of an answer that breaks off, so that it can be asked for again.
    try:
        body = b"".join([chunk async for chunk in answer.aiter_raw()])
    except httpx.TransportError:
        await replica_lost().response()(scope, receive, send)
        return
    await _start(answer, send)
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _start(answer: httpx.Response, send: Send) -> None:
    headers = [
        (name.lower(), value)
        for name, value in answer.headers.raw
        if name.lower() not in _HOP_BY_HOP and name.lower() != b"x-request-id"
    ]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    path = path.removeprefix(scope.get("root_path", "").encode()) or b"/"
    return path + b"?" + scope["query_string"] if scope["query_string"] else path


def _has_body(scope: Scope) -> bool:
    return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _body(receive: Receive) -> AsyncGenerator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body", False):
            return
