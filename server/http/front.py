"""The front sees every request first: key, headers, body, place in the queue, deadline, in this order.

The front is a plain ASGI class, because a function middleware would hide a client's disconnect from the routes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pat_serve.server.http.admission import Admission
from pat_serve.server.http.body_check import ModelBounds, check_body, check_containers
from pat_serve.server.http.deadline import within_deadline
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.exchange import NO_KEY, current
from pat_serve.server.http.policy import Policy
from pat_serve.server.http.request_bounds import BodyBudget, check_headers, check_length, header, read_body, replay
from pat_serve.server.http.served_routes import TOKENIZING

# The tokenizer takes one text after the other, and a body of some megabytes keeps it for seconds.
MAX_TOKENIZING = 64


@dataclass(frozen=True, kw_only=True)
class OwnRoutes:
    """Our routes, as the router knows them.

    Attributes:
        posts: beginnings of the paths whose bodies pydantic checks in full, in the routes' own models.
        benchmarks: beginning of the paths that have bounds of their own and may take longer than a request.
    """

    posts: tuple[str, ...]
    benchmarks: str


class Gate:
    """The front's knowledge of the running server; made when the engine is up."""

    def __init__(self, policy: Policy, admission: Admission, model: ModelBounds, own: OwnRoutes) -> None:
        self.policy = policy
        self.admission = admission
        self.model = model
        self.own = own
        # One body of the largest size always finds room.
        self.bodies = BodyBudget(max(policy.max_bodies_bytes, policy.max_body_bytes))
        self._tokenizing = Admission(capacity=MAX_TOKENIZING, per_key=admission.per_key)

    def lane(self, path: str) -> Admission:
        """The admission in which a request for a path takes its place."""
        if path not in TOKENIZING:
            return self.admission
        self._tokenizing.draining = self.admission.draining
        return self._tokenizing


class Front:
    """Refuses requests that are not to come in, and hands the others on unchanged.

    The front reads `app.state.pat_serve_gate`. Its refusals have the shape of all errors and repeat nothing of the
    request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # No route of ours is a WebSocket, so every one is closed.
            await send({"type": "websocket.close", "code": 1008})
            return
        gate: Gate = scope["app"].state.pat_serve_gate
        exchange = current.get()
        try:
            check_headers(scope)
            key = authorize(scope, gate.policy)
            if exchange is not None:
                exchange.key = key
            if (
                scope["path"].startswith(gate.own.benchmarks)
                and scope["method"] == "POST"
                and not gate.policy.benchmarks
            ):
                told = "benchmarks are off on this server (--no-benchmarks); pat-bench measures the model without it"
                raise HttpError(403, "benchmarks_off", told, headers={"Connection": "close"})
            await self._admitted(gate, key, scope, receive, send)
        except HttpError as error:
            await error.response()(scope, receive, send)

    async def _admitted(self, gate: Gate, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        policy, path, posted = gate.policy, scope["path"], scope["method"] == "POST"
        # Only a POST has use for a body, and a client that needs no key must not make the server hold one.
        max_bytes = policy.max_body_bytes if posted and path not in policy.open_paths else 0
        with gate.bodies.share() as take:
            body = await read_body(scope, receive, max_bytes=max_bytes, timeout_s=policy.receive_timeout_s, take=take)
            if body is None:
                return
            exchange = current.get()
            if exchange is not None:
                exchange.request_bytes = len(body)
            check_length(scope, body)
            sequences = 1
            check_containers(body)
            if body and not path.startswith(gate.own.posts):
                sequences = check_body(body, policy, gate.model)
            receive = replay(body, receive)
            if not posted:
                await self.app(scope, receive, send)
                return
            lane = gate.lane(path)
            with lane.admit(key, sequences if lane is gate.admission else 1) as give_back:
                send = _before_the_end(send, give_back)
                if path.startswith(gate.own.benchmarks):
                    await self.app(scope, receive, send)
                else:
                    await within_deadline(self.app, scope, receive, send, policy.request_timeout_s)


def _before_the_end(send: Send, call: Callable[[], None]) -> Send:
    """Pass an answer on, and call this before its last part.

    A client may send its next request as soon as it has the last part. The app ends some turns of the event loop later.
    """

    async def passed_on(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            call()
        await send(message)

    return passed_on


def authorize(scope: Scope, policy: Policy) -> str:
    """The name of the key that a request bears; "none" where no key is asked for.

    The path that counts is the decoded one, which routing sees. A path is open only if it is one of the open paths to
    the letter: `//health` and `/health/` ask for the key, whatever they may lead to.

    Raises:
        HttpError: 401, the request bears no key of this server.
    """
    if not policy.keys.keys or scope["path"] in policy.open_paths:
        return NO_KEY
    owner = policy.keys.owner(header(scope, b"authorization"))
    if owner is None:
        raise HttpError(
            401,
            "unauthorized",
            "this server wants an API key; send Authorization: Bearer KEY",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
    return owner
