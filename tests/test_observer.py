"""The outermost part of the server: how it sees requests to a small app, and counts them in the metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry
from starlette.types import Message, Scope

from pat_serve.server.http.access_log import AccessLog, LogFormat
from pat_serve.server.http.admission import Admission
from pat_serve.server.http.errors import HttpError, shape_vllm_errors
from pat_serve.server.http.metrics import ServerMetrics
from pat_serve.server.http.observer import Observation, Observer, error_type
from pat_serve.server.http.route_names import RouteNames
from pat_serve.server.routes.provenance import model_labels
from pat_serve.version import __version__


class App:
    """An app with an observer, and what that one has counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ServerMetrics(self.registry)
        self.app = FastAPI()
        self.app.add_middleware(Observer)
        self.app.get("/files/{name}")(self.file)
        self.app.get("/stream")(self.stream)
        self.app.get("/wrong")(self.wrong)
        self.app.get("/defect")(self.defect)
        routes = RouteNames(route.path for route in self.app.routes)
        log = AccessLog(LogFormat.JSON)
        self.app.state.pat_serve_observation = Observation(self.metrics, log, routes)

    async def file(self, name: str) -> str:
        return name

    async def stream(self) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            yield 'data: {"text": "{\\"error\\": 1}"}\n\n'
            yield 'data: {"error": {"type": "deadline", "message": "late"}}\n\ndata: [DONE]\n\n'

        return StreamingResponse(events(), media_type="text/event-stream")

    async def wrong(self) -> JSONResponse:
        return HttpError(409, "busy", "no").response()

    async def defect(self) -> None:
        raise RuntimeError

    def get(self, path: str, **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.get(
                    path, headers={name.replace("_", "-"): value for name, value in headers.items()}
                )

        return asyncio.run(ask())

    def requests(self) -> dict[tuple[str, str], float]:
        return {
            (sample.labels["route"], sample.labels["status"]): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == "pat_serve_requests_total"
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger="pat_serve.access")
    return lambda: [json.loads(record.message) for record in caplog.records if record.name == "pat_serve.access"]


def test_routes_are_counted_by_template_and_unknown_paths_as_one() -> None:
    app = App()
    for path in ("/files/a", "/files/b", "/x/1", "/x/2", "/files/a/b", "/files%0a"):
        app.get(path)
    assert app.requests() == {("/files/{name}", "200"): 2, ("other", "404"): 4}
    assert app.value("pat_serve_request_seconds_count", route="/files/{name}", key="none") == 2
    # A path that is not there has no latency worth knowing.
    assert app.value("pat_serve_request_seconds_count", route="other", key="none") is None


def test_errors_are_counted_by_their_type(lines: Any) -> None:
    app = App()
    assert app.get("/wrong").status_code == 409
    assert app.get("/stream").status_code == 200
    assert app.get("/defect").status_code == 500
    rejected = {
        (route, reason): app.value("pat_serve_rejections_total", route=route, reason=reason)
        for route, reason in (("/wrong", "busy"), ("/stream", "deadline"), ("/defect", "internal_error"))
    }
    assert set(rejected.values()) == {1}
    assert [(line["status"], line["error"]) for line in lines()] == [
        (409, "busy"), (200, "deadline"), (500, "internal_error"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"{", b'{"error": 1}', b'{"error": {"type": "a b"}}', b'{"error": {"type": 5}}', b"[" * 10**5],
)
def test_an_error_of_another_shape_makes_no_label(body: bytes) -> None:
    assert error_type(body) == "untold"


def test_request_ids(lines: Any) -> None:
    app = App()
    assert app.get("/files/a", x_request_id="mine.1").headers.get_list("x-request-id") == ["mine.1"]
    [made] = app.get("/files/a").headers.get_list("x-request-id")
    assert len(made) == 32
    # The front refuses it; it must not come back or be written down all the same.
    [other] = app.get("/files/a", x_request_id="a b").headers.get_list("x-request-id")
    assert " " not in other
    assert [line["request_id"] for line in lines()] == ["mine.1", made, other]


def test_a_defect_has_the_id_of_its_request(lines: Any) -> None:
    app = App()
    shape_vllm_errors(app.app, {})
    answer = app.get("/defect", x_request_id="mine.1")
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (500, ["mine.1"])
    [made] = app.get("/defect").headers.get_list("x-request-id")
    assert [line["request_id"] for line in lines()] == ["mine.1", made]


def test_a_client_that_leaves(lines: Any) -> None:
    app = App()
    sent: list[Message] = []

    async def leaving(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/stream", "headers": [], "app": app.app}
    asyncio.run(Observer(leaving)(scope, receive, send))
    assert app.requests() == {("/stream", "499"): 1}
    [line] = lines()
    assert (line["status"], line["response_bytes"]) == (499, 9)


def test_a_request_is_counted_before_its_client_can_know_that_it_is_over() -> None:
    app = App()
    counted: list[dict[tuple[str, str], float]] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        counted.append(app.requests())

    scope = {"type": "http", "method": "GET", "path": "/files/a", "headers": [], "query_string": b"", "app": app.app}
    asyncio.run(app.app(scope, receive, send))
    assert counted == [{}, {("/files/{name}", "200"): 1}]
    assert app.requests() == counted[-1]


def test_what_is_refused_before_it_is_a_request(lines: Any) -> None:
    app = App()
    app.app.state.pat_serve_observation.refused(HttpError(431, "headers_too_large", "told"))
    assert app.requests() == {("unparsed", "431"): 1}
    assert app.value("pat_serve_rejections_total", route="unparsed", reason="headers_too_large") == 1
    assert (lines()[0]["route"], lines()[0]["status"]) == ("unparsed", 431)


def test_places_that_are_taken() -> None:
    app, admission = App(), Admission(capacity=5)
    app.metrics.admission(admission, running=2)
    assert app.value("pat_serve_sequences_waiting_limit") == 3
    names = ("requests_in_flight", "sequences_in_flight", "sequences_waiting")
    with admission.admit("a", 3), admission.admit("a", 1):
        assert [app.value(f"pat_serve_{name}") for name in names] == [2, 4, 2]
    assert [app.value(f"pat_serve_{name}") for name in names] == [0, 0, 0]


def test_what_a_model_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plain = {
        "model": "m",
        "base": "",
        "hidden_size": "64",
        "base_hidden_size": "",
        "method": "",
        "version": __version__,
    }
    assert model_labels(str(tmp_path), "m", 64) == plain
    record = tmp_path / "pat_export.json"
    record.write_text(
        json.dumps(
            {"method": "pat", "base": {"source": 'a"\nb'}, "hidden_size": {"base": 86, "exported": 64}, "more": 1}
        )
    )
    told = plain | {"base": 'a"\nb', "base_hidden_size": "86", "method": "pat"}
    assert model_labels(str(tmp_path), "m", 64) == told
    for damaged in ("{", "[]", '{"method": 5}', json.dumps({"method": "x" * 300})):
        record.write_text(damaged)
        assert model_labels(str(tmp_path), "m", 64) == plain


def test_several_processes_share_the_figures(tmp_path: Path) -> None:
    """PROMETHEUS_MULTIPROC_DIR is set, and figures come from the files of all processes, as vLLM collects them."""
    record = (
        "from pat_serve.server.http.admission import Admission\n"
        "from pat_serve.server.http.exchange import Exchange\n"
        "from pat_serve.server.http.metrics import ServerMetrics\n"
        "metrics = ServerMetrics()\n"
        "metrics.model({'model': 'm'})\n"
        "metrics.admission(Admission(capacity=3), running=2)\n"
        "metrics.record(Exchange(method='GET', path='/a', route='/a', request_id='r'))\n"
    )
    collect = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", record], env=environment(tmp_path), check=True)
    shown = subprocess.run(
        [sys.executable, "-c", collect], env=environment(tmp_path), check=True, capture_output=True, text=True
    ).stdout
    assert 'pat_serve_requests_total{key="none",route="/a",status="0"} 2.0' in shown
    assert 'pat_serve_model_info{model="m"} 1.0' in shown
    assert "pat_serve_sequences_waiting_limit" in shown


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
