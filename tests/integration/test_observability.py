"""The real server's account of its work: metrics, dashboard, access log, request ids."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pat_serve.version import __version__
from tests.integration.conftest import (
    EXPORT_RECORD,
    HANG_S,
    KEY,
    Server,
    free_port,
    spawn,
    tail,
    wait_until_ready,
)
from tests.integration.raw_http import RawClient

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("serves_afterwards")]

MONITORING = Path(__file__).parents[2] / "monitoring"
OPENAI = ("/v1/completions", "/v1/chat/completions")
ROUTES = ("/generate", *OPENAI)


class Figures:
    """All samples of a scrape, and what has been added since another."""

    def __init__(self, client: httpx.Client) -> None:
        self.samples: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        for family in text_string_to_metric_families(client.get("/metrics").raise_for_status().text):
            for sample in family.samples:
                self.samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value

    def value(self, name: str, **labels: str) -> float:
        return self.samples[f"pat_serve_{name}", tuple(sorted(labels.items()))]

    def routes(self) -> set[str]:
        return {dict(pairs)["route"] for name, pairs in self.samples if name == "pat_serve_requests_total"}


def ask(client: httpx.Client, server: Server, route: str, *, tokens: int, stream: bool, **more: Any) -> httpx.Response:
    body = {"max_tokens": tokens, "ignore_eos": True, "stream": stream} | more
    if route == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        body["prompt"] = "Hello"
    if route in OPENAI:
        body["model"] = str(server.model)
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_request_is_counted_by_route_and_key(server: Server, client: httpx.Client, route: str, stream: bool) -> None:
    by, before = {"route": route, "key": "tests"}, Figures(client)
    timings: list[float] = []
    for _ in range(3):
        timings.append(ask(client, server, route, tokens=9, stream=stream).elapsed.total_seconds())
    after = Figures(client)

    def added(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert added("requests_total", status="200", **by) == 3
    assert added("output_tokens_total", **by) == 27
    assert added("prompt_tokens_total", **by) >= 3
    names = ("time_to_first_token", "time_per_output_token", "queue", "request")
    assert [added(f"{name}_seconds_count", **by) for name in names] == [3, 3, 3, 3]
    first_s, token_s, queue_s, request_s = (added(f"{name}_seconds_sum", **by) for name in names)
    assert 0 <= queue_s < first_s < first_s + 8 * token_s * 0.99 <= request_s
    # The client sees the whole of it and the way there and back; httpx stops its clock at a stream's end.
    assert request_s < sum(timings)


def test_rejections_are_counted_by_reason(server: Server, client: httpx.Client) -> None:
    before = Figures(client)
    stranger = {"Authorization": "Bearer wrong"}
    assert client.post("/generate", json={"prompt": ""}).status_code == 400
    assert client.post("/v1/completions", json={"model": "none", "prompt": "a"}).status_code == 404
    assert client.post("/generate", headers=stranger).status_code == 401
    assert [client.get(f"/no/{number}").status_code for number in range(4)] == [404] * 4
    with RawClient(server) as raw:
        raw.send("GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + "a" * 40_000)
        raw.answer()
    with RawClient(server) as raw:
        raw.send("no http\r\n\r\n")
        raw.answer()
    after = Figures(client)
    rejected = {
        (labels[0], labels[1]): after.samples[name, pairs] - before.samples[name, pairs]
        for name, pairs in after.samples
        if name == "pat_serve_rejections_total" and (labels := (dict(pairs)["route"], dict(pairs)["reason"]))
    }
    assert {pair: count for pair, count in rejected.items() if count} == {
        ("/generate", "invalid_request"): 1,
        ("/v1/completions", "NotFoundError"): 1,
        ("/generate", "unauthorized"): 1,
        ("other", "not_found"): 4,
        ("unparsed", "headers_too_large"): 1,
        ("unparsed", "not_http"): 1,
    }
    assert after.value("requests_total", route="other", key="tests", status="404") >= 4
    # A path that a client makes up is no label: only routes that were asked for here are new.
    assert after.routes() - before.routes() <= {*ROUTES, "/metrics", "other", "unparsed"}
    assert not {route for route in after.routes() if route.startswith("/no")}


def test_keys_are_named_and_never_shown(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    assert 'key="tests"' in text
    assert KEY not in text


def test_model_info(server: Server, client: httpx.Client) -> None:
    [info] = [dict(pairs) for name, pairs in Figures(client).samples if name == "pat_serve_model_info"]
    assert info == {
        "model": str(server.model),
        "base": EXPORT_RECORD["base"]["source"],
        "hidden_size": "64",
        "base_hidden_size": "86",
        "method": "pat",
        "version": __version__,
    }


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_every_metric_of_the_dashboard_is_there(server: Server, client: httpx.Client) -> None:
    """A panel whose metric has another name stays empty without a word."""
    for route in ROUTES:
        ask(client, server, route, tokens=4, stream=True)
    client.post("/generate", json={})
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    variables = [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    queries = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]] + variables
    names = {name for query in queries for name in re.findall(r"\b(?:pat_serve_|vllm:|process_)[a-z_:]+", query)}
    assert len(names) > 15
    samples = {name: {label for label, _ in pairs} for name, pairs in Figures(client).samples}
    assert names - samples.keys() == set()
    # And the labels that a query filters or groups by are labels of its metric.
    for query in queries:
        for name, inside in re.findall(r"((?:pat_serve_|vllm:|process_)[a-z_:]+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*[=!]~?\s*\"", inside)) - {"job", "instance"} <= samples[name], query
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_prometheus_scrapes_with_a_key() -> None:
    [job] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["authorization"]["type"] == "Bearer"


def test_request_ids_come_back_and_are_vllms_too(server: Server, client: httpx.Client) -> None:
    for route, model in (("/generate", {}), ("/v1/completions", {"model": str(server.model)})):
        body = model | {"prompt": "a", "max_tokens": 1}
        named = client.post(route, json=body, headers={"X-Request-Id": "me:1"})
        assert named.headers.get_list("x-request-id") == ["me:1"]
    assert named.json()["id"] == "cmpl-me:1"
    made = client.get("/health").headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_the_access_log(server: Server, client: httpx.Client) -> None:
    forged = "/no%0D%0A%7B%22status%22:1%7D%1B%5B31m%C2%9B"
    client.get(forged, headers={"X-Request-Id": "log-1"})
    with RawClient(server) as raw:
        raw.send("GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\x1b[31m\r\nConnection: close\r\n\r\n")
        raw.answer()
    ask(client, server, "/v1/completions", tokens=5, stream=True, request_id="body-id")
    text = server.log.read_text(errors="strict")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]
    [lost] = [line for line in lines if line["request_id"] == "log-1"]
    assert (lost["route"], lost["status"], lost["key"]) == ("other", 404, "tests")
    assert lost["path"] == "/no\\x0d\\x0a{\\x22status\\x22:1}\\x1b[31m\\x9b"
    assert "\x1b[31m" not in text
    assert {"status": 1} not in lines
    last = lines[-1]
    assert (last["method"], last["route"], last["status"]) == ("POST", "/v1/completions", 200)
    assert (last["output_tokens"], last["key"]) == (5, "tests")
    assert 0 <= last["queue_s"] < last["ttft_s"] < last["duration_s"]
    assert last["response_bytes"] > last["request_bytes"] > 50


class Collector(BaseHTTPRequestHandler):
    """Takes spans by OTLP over HTTP."""

    received: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_traces_reach_a_collector(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    port, log = free_port(), tmp_path / "log.txt"
    flags = ["--dtype", "float32", "--kv-cache-gib", "0.02"]
    process = spawn(tiny_model, port, log, *flags, "--", "--otlp-traces-endpoint", endpoint)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        trace = "0af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-Id": "traced-1"}
        body = {"model": str(tiny_model), "prompt": "a", "max_tokens": 3}
        httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", json=body, headers=headers, timeout=HANG_S
        ).raise_for_status()
        deadline_s = time.monotonic() + HANG_S
        while not any(b"traced-1" in spans for spans in Collector.received):
            assert time.monotonic() < deadline_s, tail(log)
            time.sleep(0.1)
        [spans] = [spans for spans in Collector.received if b"traced-1" in spans]
        assert bytes.fromhex(trace) in spans
    finally:
        process.terminate()
        process.wait(HANG_S)
        collector.shutdown()
