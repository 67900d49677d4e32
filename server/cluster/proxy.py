"""A middleware of Ray Serve's HTTP proxies: it repeats a request whose replica was lost, or answers that it was lost.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=pat_serve.server.cluster.proxy:middlewares ray start ...

Ray Serve by itself answers 500 in plain text for a replica that died, and breaks a stream off.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, MutableMapping
from typing import Any
from uuid import uuid4

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pat_serve.errors import UsageError
from pat_serve.server.cluster.events import error_event, is_event_stream
from pat_serve.server.cluster.repeat import may_repeat, of_serve, replica_lost, says_gone
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.policy import MIB, Policy
from pat_serve.server.http.request_bounds import BodyBudget, check_headers, check_length, header, read_body, replay

# Ray Serve logs to files by this name.
logger = logging.getLogger("ray.serve")

MAX_BODY_VARIABLE = "PAT_SERVE_RAY_MAX_BODY_MIB"
# A replica whose server has died ends itself after a second or two. Until then Ray Serve would choose it again.
REPEAT_AFTER_S = 3.0
# The paths of Ray Serve's own routes.
_SERVE_ROUTES = "/-/"
_MAX_HELD_BYTES = 64 * 1024


def middlewares() -> list[Middleware]:
    """The middlewares that Ray Serve's proxies put around themselves."""
    return [Middleware(RepeatLost, policy=proxy_policy(os.environ))]


def proxy_policy(environment: MutableMapping[str, str]) -> Policy:
    """The bounds of the requests that a proxy holds, to be able to repeat them.

    Raises:
        UsageError: the variable is no size.
    """
    told = environment.get(MAX_BODY_VARIABLE)
    if told is None:
        return Policy()
    try:
        size = int(float(told) * MIB)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UsageError(
            MAX_BODY_VARIABLE, expected="MiB of a request's body", found=told, fix="Give the replicas' --max-body-mib."
        )
    return Policy(max_body_bytes=size)


class RepeatLost:
    """Takes in the whole request, gives it to Ray Serve, and gives it again if its replica was lost before it answered.

    Args:
        app: Ray Serve's proxy.
        policy: its bounds of headers and body are used.
        repeat_after_s: pause before the second try.
    """

    def __init__(self, app: ASGIApp, policy: Policy, repeat_after_s: float = REPEAT_AFTER_S) -> None:
        self.app = app
        self._policy = policy
        self._repeat_after_s = repeat_after_s
        self._bodies = BodyBudget(max(policy.max_bodies_bytes, policy.max_body_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, with the help of a second replica if need be."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"].startswith(_SERVE_ROUTES):
            await self.app(scope, receive, send)
            return
        try:
            check_headers(scope)
            with self._bodies.share() as take:
                await self._through(scope, receive, send, take)
        except HttpError as error:
            await error.response()(scope, receive, send)

    async def _through(self, scope: Scope, receive: Receive, send: Send, take: Callable[[int], None]) -> None:
        max_bytes = self._policy.max_body_bytes if scope["method"] == "POST" else 0
        timeout_s = self._policy.receive_timeout_s
        body = await read_body(scope, receive, max_bytes=max_bytes, timeout_s=timeout_s, take=take)
        if body is None:
            return
        check_length(scope, body)
        request_id = header(scope, b"x-request-id")
        headers = list(scope["headers"])
        if request_id is None:
            request_id = uuid4().hex.encode()
            headers.append((b"x-request-id", request_id))
        tries = 2 if may_repeat(scope["method"], scope["path"]) else 1
        for left in reversed(range(tries)):
            answer = _HeldAnswer(send, request_id)
            connection = _Connection(receive)
            # Ray Serve changes the scope that it is given.
            again = {**scope, "headers": list(headers)}
            try:
                await self.app(again, replay(body, connection), answer)
            except Exception:
                logger.exception("a request failed in the proxy")
            if connection.gone or left == 0 or not answer.lost:
                break
            logger.warning("%s %s: its replica was lost; trying again", scope["method"], scope["path"])
            await asyncio.sleep(self._repeat_after_s)
        if not connection.gone:
            await answer.end()


class _Connection:
    """A `receive` that remembers whether the client has left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message


class _HeldAnswer:
    """A `send` that holds back messages which may have to be replaced: errors, and a start without a body."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._request_id = request_id
        self._start: MutableMapping[str, Any] | None = None
        self._held = b""
        self._held_whole = False
        self._passing = False
        self._complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body" or self._start is None:
            return
        more = message.get("more_body", False)
        if not self._passing and self._start["status"] >= 400:
            self._held += message.get("body", b"")
            self._held_whole = not more
            if len(self._held) <= _MAX_HELD_BYTES:
                return
            message, more = {**message, "body": self._held}, not self._held_whole
        if not self._passing:
            await self._send(self._start)
            self._passing = True
        await self._send(message)
        self._complete = not more

    @property
    def lost(self) -> bool:
        """Whether nothing has been sent, and nothing has come that is worth sending."""
        if self._passing:
            return False
        if self._start is None or not self._held_whole:
            return True
        return says_gone(self._start["status"], self._held) or (self._start["status"] == 500 and not self._is_json())

    async def end(self) -> None:
        """Send the messages that were held back, in our shape, and end a stream that broke off."""
        if self._complete:
            return
        if self._passing:
            assert self._start is not None
            # Any other answer lacks its rest. uvicorn closes its connection, and the client sees that the answer is
            # short.
            if is_event_stream(self._start["headers"]):
                last = error_event(replica_lost())
                await self._send({"type": "http.response.body", "body": last, "more_body": False})
            return
        if self._start is None or not self._held_whole:
            await self._say(replica_lost())
            return
        told = None if self._is_json() else of_serve(self._start["status"])
        if told is not None:
            await self._say(told)
            return
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": self._held, "more_body": False})

    async def _say(self, error: HttpError) -> None:
        error.headers["X-Request-Id"] = self._request_id.decode("latin-1")
        answer = error.response()
        await self._send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
        await self._send({"type": "http.response.body", "body": answer.body, "more_body": False})

    def _is_json(self) -> bool:
        assert self._start is not None
        return any(
            name.lower() == b"content-type" and value.startswith(b"application/json")
            for name, value in self._start["headers"]
        )
