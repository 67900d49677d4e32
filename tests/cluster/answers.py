"""Requests that the tests of proxy and relay send, and how they read the answers."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Message

GONE = json.dumps({"error": {"type": "engine_dead", "message": "", "param": None}}).encode()
JSON, TEXT, EVENTS = b"application/json", b"text/plain", b"text/event-stream; charset=utf-8"


def read(sent: list[Message]) -> tuple[int, Any, dict[str, str]]:
    start, *rest = sent
    body = b"".join(message["body"] for message in rest)
    assert not rest[-1].get("more_body", False)
    return start["status"], json.loads(body), {name.decode(): value.decode() for name, value in start["headers"]}
