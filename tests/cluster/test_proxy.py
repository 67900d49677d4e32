"""The middleware in Ray Serve's proxies: it repeats some requests and tells clients of a loss. Without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from pat_serve.errors import UsageError
from pat_serve.server.cluster.events import WholeEvents
from pat_serve.server.cluster.proxy import RepeatLost, middlewares, proxy_policy
from pat_serve.server.cluster.repeat import may_repeat, says_gone
from pat_serve.server.http.policy import Policy
from tests.cluster.answers import EVENTS, GONE, JSON, TEXT, read


@pytest.mark.parametrize(
    ("method", "path", "repeated"),
    [
        ("POST", "/generate", True),
        ("POST", "/v1/chat/completions", True),
        ("GET", "/v1/models", True),
        ("GET", "/ready", False),
        ("POST", "/benchmark/latency", False),
        ("POST", "/v1/responses", False),
        ("DELETE", "/generate", False),
    ],
)
def test_what_is_repeated(method: str, path: str, repeated: bool) -> None:
    assert may_repeat(method, path) is repeated


@given(st.binary(max_size=60))
def test_any_body_can_be_asked_whether_it_says_gone(body: bytes) -> None:
    assert not says_gone(503, body)


@given(st.lists(st.sampled_from([b"data: a\n\n", b"data: [DONE]\n\n", b": b\n\n"])), st.integers(1, 9))
def test_events_are_cut_between_events_and_none_is_lost(events: list[bytes], size: int) -> None:
    stream, cutter = b"".join(events), WholeEvents()
    pieces = [cutter.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
    assert b"".join(pieces) == stream
    assert all(not piece or piece.endswith(b"\n\n") for piece in pieces)
    assert cutter.rest() == b""


def test_the_body_bound_of_the_proxies_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_policy({"PAT_SERVE_RAY_MAX_BODY_MIB": "0.5"}).max_body_bytes == 2**19
    with pytest.raises(UsageError, match="PAT_SERVE_RAY_MAX_BODY_MIB"):
        proxy_policy({"PAT_SERVE_RAY_MAX_BODY_MIB": "big"})
    monkeypatch.delenv("PAT_SERVE_RAY_MAX_BODY_MIB", raising=False)
    [middleware] = middlewares()
    assert middleware.cls is RepeatLost


Step = Callable[[Scope, Receive, Send], Awaitable[None]]


def says(status: int, kind: bytes, *chunks: bytes, whole: bool = True) -> Step:
    """An application that answers, or breaks off."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"{}"
        scope["headers"].append((b"changed", b"by serve"))
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        for index, chunk in enumerate(chunks):
            more = not whole or index + 1 < len(chunks)
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

    return app


async def dies(scope: Scope, receive: Receive, send: Send) -> None:
    """Do nothing, like Ray Serve's proxy when a replica dies before it answers."""


async def fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError


def ask(*steps: Step, path: str = "/generate", leave: bool = False, length: bytes = b"2") -> tuple[list[Message], int]:
    """Messages that the client gets, and the steps that were taken."""
    taken, sent = 0, []
    todo: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal taken
        assert (b"changed", b"by serve") not in scope["headers"]
        taken += 1
        await steps[taken - 1](scope, receive, send)
        if leave:
            assert [(await receive())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]

    async def receive() -> Message:
        return todo.pop(0) if todo else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-length", length)]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    asyncio.run(RepeatLost(app, Policy(), repeat_after_s=0)(scope, receive, send))
    return sent, taken


GOOD = says(200, JSON, b'{"text": "a"}')


@pytest.mark.parametrize(
    "lost", [dies, fails, says(503, JSON, GONE), says(500, TEXT, b"died"), says(200, JSON)], ids=range(5)
)
def test_a_lost_replica_is_asked_for_once_more(lost: Step) -> None:
    sent, taken = ask(lost, GOOD)
    assert (taken, read(sent)[:2]) == (2, (200, {"text": "a"}))


def test_a_second_loss_is_an_error_to_retry() -> None:
    sent, taken = ask(dies, dies)
    status, body, headers = read(sent)
    assert (taken, status, body["error"]["type"], headers["retry-after"]) == (2, 503, "replica_lost", "1")
    assert headers["x-request-id"]


def test_a_body_that_is_too_large_to_be_held_is_refused() -> None:
    sent, taken = ask(GOOD, length=b"5000000")
    assert (taken, read(sent)[1]["error"]["type"]) == (0, "body_too_large")


def test_what_must_not_be_repeated_is_not() -> None:
    sent, taken = ask(dies, path="/benchmark/latency")
    assert (taken, read(sent)[0]) == (1, 503)


def test_nothing_is_repeated_or_said_once_the_client_has_left() -> None:
    assert ask(dies, leave=True) == ([], 1)


def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    sent, taken = ask(says(200, EVENTS, b"data: 1\n\n", whole=False))
    assert taken == 1
    assert [message["body"] for message in sent[1:-1]] == [b"data: 1\n\n"]
    assert json.loads(sent[-1]["body"].removeprefix(b"data: "))["error"]["type"] == "replica_lost"
    assert not sent[-1]["more_body"]


def test_anything_else_that_breaks_off_stays_visibly_short() -> None:
    sent, _ = ask(says(200, JSON, b'{"te', whole=False))
    assert sent[-1]["more_body"]


@pytest.mark.parametrize(
    ("status", "expected", "kind"), [(503, 503, "overloaded"), (408, 504, "deadline"), (404, 404, None)]
)
def test_what_ray_serve_itself_answers_gets_our_shape(status: int, expected: int, kind: str | None) -> None:
    sent, taken = ask(says(status, TEXT, b'"in plain text"'))
    got, body, headers = read(sent)
    assert (taken, got) == (1, expected)
    if kind:
        assert body["error"]["type"] == kind
    assert ("retry-after" in headers) == (got == 503)


def test_the_servers_own_refusals_pass_unchanged() -> None:
    overloaded = json.dumps({"error": {"type": "overloaded", "message": "full", "param": None}}).encode()
    sent, taken = ask(says(503, JSON, overloaded[:9], overloaded[9:]))
    assert (taken, read(sent)[:2]) == (1, (503, json.loads(overloaded)))
