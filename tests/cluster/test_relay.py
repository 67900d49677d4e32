"""The way to the server of a replica, before a server that is cut off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.types import Message

from pat_serve.server.cluster.relay import Relay
from tests.cluster.answers import EVENTS, JSON, read


async def receive() -> Message:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def relayed(server: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> tuple[list[Message], bytes]:
    asked = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked = await reader.readuntil(b"\r\n\r\n")
        asked += await reader.readexactly(2)
        await server(writer)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    relay = Relay(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-length", b"2"), (b"authorization", b"Bearer k"), (b"connection", b"keep-alive")]
    scope = {"type": "http", "method": "POST", "path": "/a b", "query_string": b"c=%2F", "headers": headers}
    async with listener:
        await relay(scope, receive, send)
        await relay.aclose()
    return sent, asked


def writes(*chunks: bytes) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    async def server(writer: asyncio.StreamWriter) -> None:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()

    return server


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: %b\r\nX-Request-Id: 1\r\n\r\n"


def test_request_and_answer_pass_through() -> None:
    sent, asked = asyncio.run(relayed(writes(HEAD % (13, JSON), b'{"text": "a"}')))
    assert read(sent) == (200, {"text": "a"}, {"content-length": "13", "content-type": "application/json"})
    assert asked.startswith(b"POST /a%20b?c=%2F HTTP/1.1\r\n")
    assert b"authorization: bearer k" in asked.lower()
    assert b"connection" not in asked.lower().replace(b"connection: keep-alive", b"")
    assert asked.endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize("before", [(), (HEAD % (13, JSON), b'{"te')])
def test_a_server_that_dies_before_the_whole_answer_is_an_error_to_retry(before: tuple[bytes, ...]) -> None:
    sent, _ = asyncio.run(relayed(writes(*before)))
    status, body, headers = read(sent)
    assert (status, body["error"]["type"], headers["retry-after"]) == (503, "replica_lost", "1")


def test_a_server_that_dies_in_a_stream_leaves_whole_events_and_an_error() -> None:
    sent, _ = asyncio.run(relayed(writes(HEAD % (99, EVENTS), b"data: 1\n\ndata: {")))
    assert sent[1]["body"] == b"data: 1\n\n"
    assert json.loads(sent[-1]["body"].removeprefix(b"data: "))["error"]["type"] == "replica_lost"


def test_no_server_at_all_is_an_error_to_retry() -> None:
    async def ask_nobody() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        relay = Relay("http://127.0.0.1:9")
        assert not await relay.ready(1)
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
        await relay(scope, receive, send)
        await relay.aclose()
        return sent

    assert read(asyncio.run(ask_nobody()))[0] == 503


def test_httpx_knows_what_is_used_of_it() -> None:
    # Built by hand, so that none of the client's own headers is added to a user's.
    request = httpx.Request("GET", "http://a/", headers=[(b"x", b"1")])
    assert {name.lower() for name, _ in request.headers.raw} == {b"host", b"x"}
