"""The front before a small app, by a virtual clock: no engine needed, and no time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from pat_serve.server.engine.errors import EngineDead
from pat_serve.server.http import front
from pat_serve.server.http.admission import Admission
from pat_serve.server.http.body_check import ModelBounds
from pat_serve.server.http.deadline import within_deadline
from pat_serve.server.http.errors import shape_routing_errors, shape_vllm_errors
from pat_serve.server.http.front import Front, Gate
from pat_serve.server.http.policy import Policy
from pat_serve.server.routes.plugin import OWN_ROUTES
from tests.virtual_clock import run

POLICY = Policy(max_body_bytes=1000, receive_timeout_s=0.2, request_timeout_s=0.3)


class EngineError(Exception):
    """Any error of an engine."""


class DeadError(EngineError):
    """An engine error of the kind that is told."""


class App:
    """Routes that behave like vLLM's: the work is in a task of its own, which a disconnect ends."""

    def __init__(self, policy: Policy = POLICY, capacity: int = 4) -> None:
        self.admission = Admission(capacity=capacity)
        self.cancelled = asyncio.Event()
        self.stopping = asyncio.Event()
        self.app = FastAPI()
        self.app.add_middleware(Front)
        model = ModelBounds(max_model_len=100, vocab_size=10)
        self.app.state.pat_serve_gate = Gate(policy, self.admission, model, OWN_ROUTES)
        self.app.post("/v1/echo")(self.echo)
        self.app.post("/v1/hang")(self.hang)
        self.app.post("/v1/stream")(self.stream)
        self.app.post("/v1/few")(self.few)
        self.app.post("/v1/defect")(self.defect)
        self.app.post("/v1/dead")(self.dead)
        self.app.post("/tokenize")(self.hang)
        self.app.get("/health")(self.health)
        shape_routing_errors(self.app)
        self.app.exception_handler(EngineError)(self.stop)
        shape_vllm_errors(self.app, {DeadError: EngineDead})

    async def echo(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"sequences": self.admission.sequences, "fields": len(body)}

    async def health(self) -> dict[str, Any]:
        return {}

    async def hang(self, request: Request) -> dict[str, Any]:
        await request.body()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancelled.set()
        return {}

    async def stream(self) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            try:
                while True:
                    yield "data: {}\n\n"
                    await asyncio.sleep(0.05)
            finally:
                self.cancelled.set()

        return StreamingResponse(events(), media_type="text/event-stream")

    async def few(self) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            yield "data: {}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def dead(self) -> None:
        raise DeadError("see the stack trace")

    async def stop(self, _: Request, error: Exception) -> JSONResponse:
        """Stand in for vLLM's handler of all its errors, which ends the server where the engine is dead."""
        self.stopping.set()
        return JSONResponse({"error": {"message": str(error)}}, status_code=500)

    async def defect(self) -> None:
        raise RuntimeError("/secret/path of the server")

    def run(self, call: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> httpx.Response:
        async def with_client() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await call(client)

        answer = run(with_client())
        assert (self.admission.sequences, self.admission.requests) == (0, 0)
        assert self.app.state.pat_serve_gate.bodies.held == 0
        return answer


def kind(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["type"])


def test_a_body_reaches_the_route_and_holds_its_place() -> None:
    answer = App().run(lambda client: client.post("/v1/echo", json={"prompt": ["a", "b"], "a": 1}))
    assert answer.json() == {"sequences": 2, "fields": 2}


@pytest.mark.parametrize("path", ["/v1/echo", "/v1/few"])
def test_the_next_request_finds_the_place_of_an_answer_that_has_arrived(path: str) -> None:
    """A client at its bound may ask again as soon as it has the last byte, before the route has ended."""
    app = App()
    seen: list[tuple[int, int]] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            seen.append((app.admission.sequences, app.admission.requests, app.admission.unfinished))

    async def ask() -> None:
        asked = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Message:
            return asked.pop() if asked else await asyncio.Event().wait() or {}

        headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        await app.app(scope, receive, send)

    run(ask())
    # The place is free, and a server that stops still waits for the request.
    assert seen == [(0, 0, 1)]
    assert app.admission.unfinished == 0


def test_a_body_in_chunks_is_counted_as_it_comes() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 100

    assert kind(App().run(lambda client: client.post("/v1/echo", content=chunks()))) == "body_too_large"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("POST", "/health"), ("POST", "/ready"), ("GET", "/v1/echo"), ("PUT", "/v1/echo")],
)
def test_a_body_where_none_is_taken(method: str, path: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b" "
        raise AssertionError("it is read on")

    for content in (b" ", chunks()):
        answer = App().run(lambda client, content=content: client.request(method, path, content=content))
        assert (answer.status_code, kind(answer), answer.headers["connection"]) == (413, "body_too_large", "close")
    answer = App().run(lambda client: client.request(method, path, headers={"Content-Length": "0"}))
    assert answer.status_code in (200, 400, 404, 405)


def test_bodies_have_a_bound_together() -> None:
    app = App(replace(POLICY, max_bodies_bytes=1500, request_timeout_s=30))
    large = {"a": "x" * 900}

    async def two(client: httpx.AsyncClient) -> httpx.Response:
        first = asyncio.create_task(client.post("/v1/hang", json=large))
        while app.admission.requests == 0:
            await asyncio.sleep(0.01)
        assert app.app.state.pat_serve_gate.bodies.held > 900
        assert (await client.post("/v1/echo", json={})).status_code == 200
        answer = await client.post("/v1/echo", json=large)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return answer

    answer = app.run(two)
    assert (answer.status_code, kind(answer), answer.headers["retry-after"]) == (503, "overloaded", "1")
    # One that is allowed by itself always finds room.
    assert App(replace(POLICY, max_bodies_bytes=1)).run(lambda c: c.post("/v1/echo", json=large)).status_code == 200


def test_benchmarks_can_be_switched_off() -> None:
    app = App(replace(POLICY, benchmarks=False))
    answer = app.run(lambda client: client.post("/benchmark/latency", json={}))
    assert (answer.status_code, kind(answer)) == (403, "benchmarks_off")
    assert "pat-bench" in answer.text
    assert app.run(lambda client: client.get("/benchmark/speedup")).status_code == 404
    assert App().run(lambda client: client.post("/benchmark/latency", json={})).status_code == 404


def test_tokenizing_has_a_deadline_and_a_queue_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "MAX_TOKENIZING", 2)
    app = App()

    async def three(client: httpx.AsyncClient) -> httpx.Response:
        with app.admission.admit("none", 4):
            waiting = [asyncio.create_task(client.post("/tokenize", json={"prompt": ["a", "b"]})) for _ in range(2)]
            await asyncio.sleep(0.1)
            answer = await client.post("/tokenize", json={})
            assert [one.status_code for one in await asyncio.gather(*waiting)] == [504, 504]
        app.admission.draining = True
        assert kind(await client.post("/tokenize", json={})) == "stopping"
        return answer

    assert kind(app.run(three)) == "overloaded"


def test_a_body_that_does_not_come_in_time() -> None:
    async def late() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(10)

    answer = App().run(lambda client: client.post("/v1/echo", content=late()))
    assert (answer.status_code, kind(answer)) == (408, "body_timeout")
    assert answer.headers["connection"] == "close"


def test_deadline_before_the_answer() -> None:
    app = App()
    answer = app.run(lambda client: client.post("/v1/hang", json={}))
    assert (answer.status_code, kind(answer)) == (504, "deadline")
    assert app.cancelled.is_set()


def test_the_end_of_a_late_stream_waits_for_a_client_that_reads_slowly() -> None:
    """The work ends as soon as it sees the client gone, long before there is room for the last event."""
    sent: list[Message] = []

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError("the client stays")

    async def slow_send(message: Message) -> None:
        if not message.get("more_body", True):
            await asyncio.sleep(0.3)
        sent.append(message)

    run(within_deadline(stream, {"type": "http"}, receive, slow_send, timeout_s=0.05))
    assert b'"deadline"' in sent[-1]["body"]
    assert sent[-1]["more_body"] is False


def test_deadline_in_a_stream() -> None:
    app = App()
    answer = app.run(lambda client: client.post("/v1/stream", json={}))
    *events, last, done = answer.text.strip().split("\n\n")
    assert len(events) > 1
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "deadline"
    assert done == "data: [DONE]"
    assert app.cancelled.is_set()


def test_a_full_queue_and_a_stopping_server() -> None:
    app = App(capacity=1)

    async def while_busy(client: httpx.AsyncClient) -> httpx.Response:
        with app.admission.admit("none", 1):
            return await client.post("/v1/echo", json={})

    answer = app.run(while_busy)
    assert (answer.status_code, kind(answer), answer.headers["retry-after"]) == (503, "overloaded", "1")
    app.admission.draining = True
    assert kind(app.run(lambda client: client.post("/v1/echo", json={}))) == "stopping"
    assert app.run(lambda client: client.get("/nothing")).status_code == 404


def test_a_defect_says_nothing_of_the_inside() -> None:
    answer = App().run(lambda client: client.post("/v1/defect", json={}))
    assert (answer.status_code, kind(answer)) == (500, "internal_error")
    assert "secret" not in answer.text


def test_a_dead_engine_is_told_as_our_routes_tell_it_and_ends_the_server() -> None:
    app = App()
    answer = app.run(lambda client: client.post("/v1/dead", json={}))
    assert (answer.status_code, kind(answer)) == (503, "engine_dead")
    assert "stack trace" not in answer.text
    assert app.stopping.is_set()


def test_a_wrong_body_is_not_repeated() -> None:
    answer = App(replace(POLICY, max_body_bytes=10**6)).run(lambda client: client.post("/v1/echo", content=b"[1]"))
    assert answer.status_code == 400
    assert len(answer.text) < 300


def test_websockets_are_closed() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    run(Front(App().app)({"type": "websocket"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
