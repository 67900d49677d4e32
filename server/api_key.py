"""The API key on every route but the probes.

vLLM's own `--api-key` guards a few path prefixes (/v1 and its like) and leaves others open that generate just as well,
/invocations for one; this asks for the same key everywhere.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pat_serve.server.http_errors import HttpError

# Probes carry no key and cost at most a token every few seconds.
OPEN_PATHS = ("/health", "/ready")


class ApiKeyMiddleware:
    """Answers 401 to a request without a key, if the server has keys.

    A plain ASGI class: a function middleware would hide a client's disconnect from the routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN_PATHS:
            # The same two sources and the same precedence as vLLM's own check.
            keys = scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")]
            try:
                check_api_key(Headers(scope=scope).get("Authorization"), [key for key in keys if key])
            except HttpError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def check_api_key(authorization: str | None, keys: Sequence[str]) -> None:
    """Compare an Authorization header with the keys, in a time that does not depend on how much of it is right.

    Raises:
        HttpError: 401, there are keys and the header bears none of them.
    """
    scheme, _, given = (authorization or "").partition(" ")
    # Every key is compared, so that the time does not tell which one came near.
    matches = [secrets.compare_digest(_digest(given), _digest(key)) for key in keys]
    if keys and not (scheme.lower() == "bearer" and any(matches)):
        raise HttpError(401, "unauthorized", "this server wants an API key; send Authorization: Bearer KEY")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
