"""Ways to ask a server, and what every answer of a kind must look like."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterable
from typing import Any

import httpx

from tests.integration.conftest import KEY, Server


def events(stream: Iterable[str]) -> list[Any]:
    """The JSON of every server-sent event in a stream's lines; the last one must be [DONE]."""
    lines = [line for line in stream if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    assert data[-1] == "[DONE]"
    return [json.loads(event) for event in data[:-1]]


def post(server: Server, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request without waiting for its answer."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection


def check_error(response: httpx.Response, status: int, kind: str, param: str | None, told: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert response.json().keys() == {"error"}
    assert error.keys() == {"type", "message", "param"}
    assert (error["type"], error["param"]) == (kind, param)
    assert re.search(told, error["message"]), error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
