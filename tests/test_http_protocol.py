"""uvicorn with our protocol before a small app, over real sockets."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.policy import Policy
from pat_serve.server.http.protocol import CONNECTIONS_END_S, bounded_protocol

# Whatever is not about a timeout must not meet one.
POLICY = Policy(receive_timeout_s=300, send_timeout_s=300, max_connections=3)
SOON_S = 0.5
HANG_S = 120


async def read(receive: Receive) -> int:
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    return size


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with as much as the path says, or with what it has read."""
    if scope["path"] == "/read":
        size = await read(receive)
        headers = [(b"x-read", b"%d of %d" % (size, len(scope["headers"])))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})
        return
    size = int(scope["path"][1:])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(size):
        await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
    await send({"type": "http.response.body"})


@contextmanager
def serving(
    *,
    guarded: bool = True,
    policy: Policy = POLICY,
    refused: Callable[[HttpError], None] = lambda error: None,
    before: Callable[[Any], None] = lambda address: None,
) -> Iterator[Any]:
    """A server and its address; `before` has the address while the server does not look at its connections yet."""
    config = uvicorn.Config(
        app,
        http=bounded_protocol(policy, guarded=lambda: guarded, refused=refused),
        lifespan="off",
        log_level="error",
        timeout_graceful_shutdown=CONNECTIONS_END_S + 1,
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        before(listener.getsockname())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield server, listener.getsockname()
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def until_closed(client: socket.socket) -> bytes:
    client.settimeout(HANG_S)
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def request_id(answer: bytes) -> str:
    head = answer.split(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in head)["x-request-id"]


def test_an_app_without_its_front_serves_nobody() -> None:
    with serving(guarded=False) as (_, address), socket.create_connection(address) as client:
        assert until_closed(client) == b""


def test_a_request_is_served_and_an_idle_connection_is_closed() -> None:
    with serving() as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET /1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert until_closed(client).startswith(b"HTTP/1.1 200")
    impatient = replace(POLICY, receive_timeout_s=SOON_S)
    with serving(policy=impatient) as (_, address), socket.create_connection(address) as client:
        assert until_closed(client) == b""


def test_headers_that_do_not_end() -> None:
    with socket.socket() as client:

        def begin(address: Any) -> None:
            client.connect(address)
            client.sendall(b"GET /1 HTTP/1.1\r\nHost: x\r\n")

        with serving(policy=replace(POLICY, receive_timeout_s=SOON_S), before=begin):
            assert request_id(answer := until_closed(client))
            assert answer.startswith(b"HTTP/1.1 408")
    with serving() as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET /1 HTTP/1.1\r\nX: ")
        client.sendall(b"a" * 40_000)
        client.sendall(b"a" * 40_000)
        assert request_id(answer := until_closed(client))
        assert answer.startswith(b"HTTP/1.1 431")


def test_what_is_not_http_is_told_so_with_an_id() -> None:
    with serving() as (_, address), socket.create_connection(address) as client:
        client.sendall(b"\x16\x03\x01\r\n\r\n")
        assert request_id(answer := until_closed(client))
        assert answer.startswith(b"HTTP/1.1 400")


CHUNKED = b"POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "after",
    [b"5\r\nhello\r\n0\r\n", b"5\r\nhello\r\n0\r\nX-Big: ", b"5;x="],
    ids=["many", "large", "extension"],
)
def test_trailers_that_do_not_end(after: bytes) -> None:
    """They come behind the headers' check, and nobody has asked for them."""
    told: list[HttpError] = []
    with serving(refused=told.append) as (_, address), socket.create_connection(address) as client:
        client.settimeout(HANG_S)
        client.sendall(CHUNKED)
        piece = b"a: b\r\n" * 10_000 if after.endswith(b"0\r\n") else b"a" * 60_000
        deadline_s = time.monotonic() + HANG_S
        # The server throws away bytes after the refusal for a while, so that the client can read the refusal.
        with suppress(OSError):
            client.sendall(after)
            while time.monotonic() < deadline_s:
                client.sendall(piece)
    assert [(error.status, error.kind) for error in told] == [(431, "headers_too_large")]


def test_a_few_trailers_are_read_and_dropped() -> None:
    with serving() as (_, address), socket.create_connection(address) as client:
        client.sendall(CHUNKED + b"5\r\nhello\r\n0\r\n" + b"Authorization: Bearer a\r\n" * 9 + b"\r\n")
        assert b"x-read: 5 of 3\r\n" in until_closed(client)


@pytest.mark.parametrize("length", [1_000_000, 100])
def test_a_body_is_not_counted_as_headers(length: int) -> None:
    with serving() as (_, address), socket.create_connection(address) as client:
        client.sendall(CHUNKED + (b"%x\r\n%b\r\n" % (length, b"x" * length)) * 10 + b"0\r\n\r\n")
        assert b"x-read: %d of 3\r\n" % (10 * length) in until_closed(client)


def test_a_reader_that_stops_is_cut_off() -> None:
    with serving(policy=replace(POLICY, send_timeout_s=SOON_S)) as (server, address), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(b"GET /1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1) == b"H"
        deadline_s = time.monotonic() + HANG_S
        while server.server_state.connections:
            assert time.monotonic() < deadline_s, "it is waited for"
            time.sleep(0.05)


def test_connections_are_bounded() -> None:
    with serving() as (_, address), ExitStack() as clients:
        first = [clients.enter_context(socket.create_connection(address)) for _ in range(3)]
        assert until_closed(clients.enter_context(socket.create_connection(address))) == b""
        # The others are served.
        for client in first:
            client.sendall(b"GET /1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert until_closed(client).startswith(b"HTTP/1.1 200")


def test_a_stop_cuts_off_who_does_not_read_and_logs_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as (server, address), socket.socket() as client:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(b"GET /1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline_s = time.monotonic() + HANG_S
        while not any(one.flow.write_paused for one in list(server.server_state.connections) if one.transport):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        server.should_exit = True
        while server.server_state.tasks:
            assert time.monotonic() < deadline_s, "it is waited for"
            time.sleep(0.05)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
