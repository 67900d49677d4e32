"""The API key on our routes: vLLM's `--api-key` guards only paths under /v1, so ours ask for it themselves."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence

from fastapi import Request

from pat_serve.server.http_errors import HttpError


def require_api_key(request: Request) -> None:
    """Let a request through if the server has no keys, or if it bears one of them.

    Raises:
        HttpError: 401.
    """
    # The same two sources and the same precedence as vLLM's own check.
    keys = request.app.state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    check_api_key(request.headers.get("Authorization"), [key for key in keys if key])


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
