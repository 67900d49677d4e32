"""The requests that are given to a second replica when the first was lost, and the answers to the other requests."""

from __future__ import annotations

import json
from http import HTTPStatus

from pat_serve.server.http.errors import RETRY_AFTER_S, HttpError

# The `error.type` of answers that say that a replica is gone or going. The request has then had no effect.
_GONE = frozenset({"replica_lost", "engine_dead", "stopping", "not_ready"})
# These routes compute and keep nothing: a second request changes nothing but the time that it takes.
_PURE_POSTS = frozenset(
    {
        "/generate",
        "/baseline/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)
# The answer of this route is about the replica itself; the answer of another replica would be wrong.
_ABOUT_ITSELF = frozenset({"/ready"})


def may_repeat(method: str, path: str) -> bool:
    """Whether a request may be sent a second time, given that nothing of its answer has been sent."""
    if method in ("GET", "HEAD"):
        return path not in _ABOUT_ITSELF
    return method == "POST" and path in _PURE_POSTS


def error_type(body: bytes) -> str | None:
    """The `error.type` of an answer; None if the body is not one of ours."""
    try:
        kind = json.loads(body)["error"]["type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None


def says_gone(status: int, body: bytes) -> bool:
    """Whether an answer says that its replica is gone or going, and nothing about the request."""
    return status == HTTPStatus.SERVICE_UNAVAILABLE and error_type(body) in _GONE


def replica_lost() -> HttpError:
    """503: the replica died before it answered."""
    return HttpError(
        503,
        "replica_lost",
        "the replica that had this request was lost; send it again",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def of_serve(status: int) -> HttpError | None:
    """Our form of an answer that Ray Serve itself gives in plain text; None for an answer that may stay as it is."""
    match status:
        case 503 | 429:
            told = "no replica takes more requests, or there is none; send it again later"
            return HttpError(503, "overloaded", told, headers={"Retry-After": str(RETRY_AFTER_S)})
        case 408:
            # A 408 would say that the client was slow.
            return HttpError(504, "deadline", "the request took longer than Ray Serve's request_timeout_s")
        case 500:
            return replica_lost()
        case _:
            return None
