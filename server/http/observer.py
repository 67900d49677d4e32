"""The outermost part of the server: it sees every request and every byte of its answer, and adds one header."""

from __future__ import annotations

import re
from uuid import uuid4

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pat_serve.server.engine.token_watch import current_work
from pat_serve.server.http.access_log import AccessLog
from pat_serve.server.http.body_check import valid_request_id
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.exchange import CLIENT_LEFT, Exchange, current
from pat_serve.server.http.metrics import ServerMetrics
from pat_serve.server.http.route_names import UNPARSED, RouteNames

REQUEST_ID = b"x-request-id"
# An error begins so in a stream of ours and of vLLM's. Text that a model makes stands further in.
_ERROR_EVENT = b'data: {"error"'
_REASON = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_UNTOLD = "untold"


class Observation:
    """Turns what the observer sees into metrics and lines of the log.

    Args:
        metrics: counts requests and observes their times.
        log: writes a line for each request; None writes nothing.
        routes: names of the app's routes.
    """

    def __init__(self, metrics: ServerMetrics, log: AccessLog | None, routes: RouteNames) -> None:
        self.metrics = metrics
        self.log = log
        self.routes = routes

    def begin(self, scope: Scope) -> Exchange:
        """Begin the exchange of a request that has come.

        The id of the request is put into its headers, so that vLLM's own log has the same id.
        """
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), None)
        request_id = given.decode("latin-1") if given is not None else ""
        if not valid_request_id(request_id):
            # An id that the client sent and that is not valid stays in the headers: the front refuses the request for
            # it.
            request_id = uuid4().hex
        if given is None:
            scope["headers"] = [*scope["headers"], (REQUEST_ID, request_id.encode())]
        path = scope["path"]
        return Exchange(method=scope["method"], path=path, route=self.routes.name(path), request_id=request_id)

    def end(self, exchange: Exchange) -> None:
        """Record an exchange whose answer has ended, or whose client has left."""
        exchange.close()
        self.metrics.record(exchange)
        if self.log is not None:
            self.log.write(exchange)

    def refused(self, error: HttpError) -> None:
        """Record a connection that was refused before there was a request."""
        self.metrics.record_unparsed(error.status, error.kind)
        if self.log is not None:
            exchange = Exchange(method="-", path=UNPARSED, route=UNPARSED, request_id="-")
            exchange.status, exchange.error = error.status, error.kind
            self.log.write(exchange)


class Observer:
    """The middleware that observes. It reads `app.state.pat_serve_observation`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and the answer back."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        observation: Observation = scope["app"].state.pat_serve_observation
        exchange = observation.begin(scope)
        left = False

        async def observed_receive() -> Message:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not exchange.complete)
            return message

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = [field for field in message.get("headers", ()) if field[0].lower() != REQUEST_ID]
                message = {**message, "headers": [*headers, (REQUEST_ID, exchange.request_id.encode())]}
            elif message["type"] == "http.response.body":
                body = message.get("body", b"")
                if exchange.status >= 400 or body.startswith(_ERROR_EVENT):
                    exchange.error = exchange.error or error_type(body)
                exchange.response_bytes += len(body)
                exchange.complete = not message.get("more_body", False)
                if exchange.complete:
                    # The request is counted before its client can know that it is over, so a client that asks for the
                    # metrics next finds it counted.
                    end()
            await send(message)

        def end() -> None:
            if not exchange.closed:
                if exchange.status >= 400 and exchange.error is None:
                    exchange.error = _UNTOLD
                observation.end(exchange)

        token, work_token = current.set(exchange), current_work.set(exchange.work)
        try:
            await self.app(scope, observed_receive, observed_send)
        except Exception:
            # Starlette's outermost part answers the request, if it still can.
            exchange.status, exchange.error = exchange.status or 500, "internal_error"
            raise
        finally:
            current.reset(token)
            current_work.reset(work_token)
            if left and not exchange.complete:
                exchange.status = CLIENT_LEFT
            end()


def error_type(body: bytes) -> str:
    """The `error.type` of an error's body or event; "untold" where it has none that can be a label."""
    try:
        document = from_json(body.removeprefix(b"data: ").split(b"\n", 1)[0])
        kind = document["error"]["type"]
    except (ValueError, TypeError, LookupError):
        return _UNTOLD
    return kind if isinstance(kind, str) and _REASON.fullmatch(kind) else _UNTOLD
