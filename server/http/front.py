"""The first thing that sees a request: key, headers, body, place in the queue, deadline, in this order.

A plain ASGI class: a function middleware would hide a client's disconnect from the routes.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from pat_serve.server.http.admission import Admission
from pat_serve.server.http.body_check import ModelBounds, check_body, check_containers
from pat_serve.server.http.deadline import within_deadline
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.exchange import NO_KEY, current
from pat_serve.server.http.request_bounds import check_headers, check_length, header, read_body, replay
from pat_serve.server.policy import Policy

# Whose bodies pydantic checks in full, in the routes' own models.
_OWN = ("/generate", "/baseline/generate", "/benchmark/")
# A benchmark has bounds of its own and takes longer than a request may.
_UNTIMED = ("/benchmark/",)
# The engine does not hear of these.
_CHEAP = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})


class Gate:
    """What the front needs to know of the running server; made when the engine is up."""

    def __init__(self, policy: Policy, admission: Admission, model: ModelBounds) -> None:
        self.policy = policy
        self.admission = admission
        self.model = model


class Front:
    """Refuses what is not to come in; tells the routes behind it nothing but the request.

    Reads `app.state.pat_serve_gate`. What it refuses has the shape of all errors and repeats nothing of the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # No route of ours is a WebSocket, so there is nothing to guard but the door.
            await send({"type": "websocket.close", "code": 1008})
            return
        gate: Gate = scope["app"].state.pat_serve_gate
        exchange = current.get()
        try:
            check_headers(scope)
            key = authorize(scope, gate.policy)
            if exchange is not None:
                exchange.key = key
            await self._admitted(gate, key, scope, receive, send)
        except HttpError as error:
            await error.response()(scope, receive, send)

    async def _admitted(self, gate: Gate, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, gate.policy)
        if body is None:
            return
        exchange = current.get()
        if exchange is not None:
            exchange.request_bytes = len(body)
        check_length(scope, body)
        path, sequences = scope["path"], 1
        check_containers(body)
        if body and scope["method"] == "POST" and not path.startswith(_OWN):
            sequences = check_body(body, gate.policy, gate.model)
        receive = replay(body, receive)
        if scope["method"] != "POST" or path in _CHEAP:
            await self.app(scope, receive, send)
            return
        with gate.admission.admit(key, sequences):
            if path.startswith(_UNTIMED):
                await self.app(scope, receive, send)
            else:
                await within_deadline(self.app, scope, receive, send, gate.policy.request_timeout_s)


def authorize(scope: Scope, policy: Policy) -> str:
    """Name of the key that a request bears; "none" where none is asked for.

    By the decoded path that routing sees, and only if it is an open one to the letter: whatever `//health`, `/health/`
    or a Host header may lead to, it asks for the key.

    Raises:
        HttpError: 401.
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
