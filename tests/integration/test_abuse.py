"""Requests that no honest client sends, against the real engine: refused as documented, and the next one is served."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.conftest import KEY, MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_QUEUE, Server, metric, wait_for
from tests.integration.raw_http import AUTHORIZED, JSON, RawClient

pytestmark = pytest.mark.vllm

MIB = 2**20
SECRET = "zzSECRETzz"
LONG = {"prompt_token_ids": [5], "max_tokens": MAX_MODEL_LEN - 10, "ignore_eos": True}
GENERATING = ["/generate", "/v1/completions"]
# More than tokens and answers of a test can come to, less than one of its bodies would if it were kept.
MEMORY_SLACK = 48 * MIB


def memory_bytes(server: Server) -> int:
    process = psutil.Process(server.process.pid)
    return sum(child.memory_info().rss for child in [process, *process.children(recursive=True)])


@pytest.fixture(autouse=True)
def serves_afterwards(server: Server, client: httpx.Client) -> Iterator[None]:
    yield
    assert client.post("/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert client.get("/ready").status_code == 200
    log = server.log.read_text(errors="replace")
    assert KEY not in log
    assert "Traceback" not in log


def long_body(server: Server, path: str, *, stream: bool, **more: Any) -> dict[str, Any]:
    if path == "/generate":
        return LONG | {"stream": stream} | more
    return {
        "model": str(server.model),
        "prompt": [5],
        "max_tokens": MAX_MODEL_LEN - 10,
        "ignore_eos": True,
        "stream": stream,
    } | more


def test_every_route_wants_the_key(server: Server, client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()["paths"]
    routes = [(method.upper(), path) for path, methods in schema.items() for method in methods]
    assert len(routes) > 15
    routes += [("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/nothing", "/")]
    routes += [("OPTIONS", "/generate"), ("HEAD", "/v1/models"), ("TRACE", "/health/"), ("GET", "/metrics")]
    with httpx.Client(base_url=server.url, timeout=60) as stranger:
        for method, path in routes:
            if path in ("/health", "/ready"):
                continue
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                answer = stranger.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready"):
            assert stranger.get(path).status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models", "/%2fv1/models", "/v1%2fmodels", "/v1/models/", "/./v1/models", "/health/../v1/models",
        "/health/%2e%2e/v1/models", "/health%00/v1/models", "/health;/v1/models", "/health/",
        "//health", "/HEALTH", "/%2576ersion", "http://x/v1/models", "/v1/models?/health", "/ready/../metrics",
        "/metrics/", "//metrics", "/m%65trics",
    ],
)  # fmt: skip
def test_path_tricks_do_not_bypass_the_key(server: Server, target: str) -> None:
    for host in ("x", "localhost/health", "127.0.0.1/health?", ""):
        with RawClient(server) as raw:
            forged = "X-Forwarded-Prefix: /health\r\nX-Original-URL: /health\r\nX-Forwarded-For: 127.0.0.1\r\n"
            raw.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{forged}Connection: close\r\n\r\n")
            status, text = raw.answer()
            assert status in (400, 401), (target, host, text)
            assert "vllm:" not in text


def head(path: str = "/generate", *fields: str) -> str:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", AUTHORIZED.strip(), JSON.strip(), *fields, "", ""])


@pytest.mark.parametrize("path", [*GENERATING, "/tokenize", "/nothing"])
def test_a_body_that_is_too_large_by_its_length(server: Server, path: str) -> None:
    with RawClient(server) as raw:
        raw.send(head(path, f"Content-Length: {MIB + 1}", "Expect: 100-continue"))
        assert raw.answer()[0] == 413  # before any of it was sent


def test_a_chunked_body_that_does_not_end(server: Server) -> None:
    before = memory_bytes(server)
    for _ in range(8):
        with RawClient(server) as raw:
            raw.send(head("/v1/completions", "Transfer-Encoding: chunked"))
            sent = 0
            while raw.send(b"10000\r\n" + b"x" * 65536 + b"\r\n") and sent < 64 * MIB:
                sent += 65536
            assert sent < 32 * MIB, "it was read on"
            assert raw.answer()[0] in (0, 413)
    assert memory_bytes(server) - before < MEMORY_SLACK


@pytest.mark.parametrize(
    ("fields", "body", "statuses"),
    [
        (["Content-Length: 5"], b'{"prompt": "a", "max_tokens": 2}', {400}),
        (["Content-Length: -1"], b"{}", {400}),
        (["Content-Length: 2", "Content-Length: 3"], b"{} ", {400}),
        (["Content-Length: 99999999999999999999999"], b"{}", {400, 413}),
        (["Content-Length: 0x2"], b"{}", {400}),
        (["Content-Length: 2", "Transfer-Encoding: chunked"], b"2\r\n{}\r\n0\r\n\r\n", {400}),
        (["Transfer-Encoding: chunked"], b"FFFFFFFFFFFFFFFFF\r\n{}", {400}),
        (["Transfer-Encoding: chunked"], b"zz\r\n{}\r\n0\r\n\r\n", {400}),
        (["Transfer-Encoding: gzip"], b"{}", {400}),
    ],
)
def test_lying_lengths(server: Server, fields: list[str], body: bytes, statuses: set[int]) -> None:
    with RawClient(server) as raw:
        raw.send(head("/generate", *fields, "Connection: close"), body)
        assert raw.answer()[0] in statuses


def test_a_body_that_ends_before_its_length(server: Server) -> None:
    for _ in range(3):
        with RawClient(server) as raw:
            raw.send(head("/generate", "Content-Length: 1000"), b'{"prompt"')


@pytest.mark.parametrize(
    "fields",
    [[f"X-{index}: a" for index in range(2000)], ["X-Big: " + "a" * 40_000], ["X-Request-Id: " + "a" * MIB]],
    ids=["2000 headers", "40 kB", "1 MB request id"],
)
def test_headers_that_are_too_many_or_too_large(server: Server, fields: list[str]) -> None:
    with RawClient(server) as raw:
        raw.send(head("/generate", *fields, "Content-Length: 2"), b"{}")
        assert raw.answer()[0] == 431


def test_a_url_that_is_too_long(server: Server) -> None:
    for target in ("/health?" + "a" * 10_000, "/" + "a" * 10_000):
        with RawClient(server) as raw:
            raw.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n")
            status, text = raw.answer()
            assert status == 414
            assert "aaaa" not in text


def test_an_unknown_field_with_a_long_name(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "a", SECRET + "a" * 100_000: 1})
    assert answer.status_code == 400
    assert len(answer.text) < 1000


def test_a_header_of_16_mib(server: Server) -> None:
    before = memory_bytes(server)
    for _ in range(8):
        with RawClient(server) as raw:
            raw.send("GET /health HTTP/1.1\r\nHost: x\r\nX-Big: ")
            for _ in range(256):
                if not raw.send(b"a" * 65536):
                    break
            assert raw.answer()[0] in (0, 431)
    assert memory_bytes(server) - before < MEMORY_SLACK


@pytest.mark.parametrize("request_id", ["a b", "a/b", "a" * 129, "\x01", "\xff", '"}'])
def test_a_request_id_that_does_not_belong_into_logs(server: Server, request_id: str) -> None:
    with RawClient(server) as raw:
        raw.send(head("/generate", f"X-Request-Id: {request_id}", "Content-Length: 2", "Connection: close"), b"{}")
        status, text = raw.answer()
        assert status == 400
        assert "aaaa" not in text


@pytest.mark.parametrize(
    ("begun", "statuses"),
    [
        ("", {0}),
        ("GET /health", {408}),
        ("GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ", {408}),
        (head("/generate", "Content-Length: 100") + '{"prompt": ', {408}),
        (head("/generate", "Transfer-Encoding: chunked") + "50\r\n{", {408}),
    ],
    ids=["nothing", "request line", "headers", "body", "chunk"],
)
def test_a_client_that_drips(server: Server, client: httpx.Client, begun: str, statuses: set[int]) -> None:
    with RawClient(server) as raw:
        raw.send(begun)
        begun_s = time.monotonic()
        raw.socket.settimeout(0.5)
        received = b""
        # A byte now and then must not win it more time; 3 s are what this server allows.
        while time.monotonic() < begun_s + 40:
            try:
                data = raw.socket.recv(65536)
            except TimeoutError:
                if begun and not raw.send(b"a"):
                    break
                continue
            except ConnectionResetError:
                break
            received += data
            if not data:
                break
        else:
            pytest.fail("the connection was kept")
        assert (int(received.split(b" ", 2)[1]) if received else 0) in statuses


def test_empty_lines_do_not_keep_a_connection(server: Server) -> None:
    with RawClient(server) as raw:
        raw.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        begun_s = time.monotonic()
        raw.socket.settimeout(0.5)
        closed = False
        while not closed and time.monotonic() < begun_s + 40:
            try:
                closed = raw.socket.recv(65536) == b"" or not raw.send(b"\r\n")
            except TimeoutError:
                closed = not raw.send(b"\r\n")
            except ConnectionResetError:
                closed = True
        assert closed


BROKEN = {
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "1e999": b'{"prompt": "a", "temperature": 1e999}',
    "NUL byte": b'{"prompt": "a\x00"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate bytes": b'{"prompt": "\xed\xa0\x80"}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "1,000 deep": b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "100,000 deep": b"[" * 100_000,
    "5,000 digits": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "not an object": b"[1, 2]",
    "empty": b"",
    "two": b"{}{}",
    "10k wrong items": b'{"prompt": [' + b", ".join([b'{"a": "' + SECRET.encode() + b'"}'] * 10_000) + b"]}",
    "10k wrong ids": b'{"prompt_token_ids": [' + b", ".join([b'"' + SECRET.encode() + b'"'] * 10_000) + b"]}",
    "10k wrong messages": b'{"messages": [' + b", ".join([b'"' + SECRET.encode() + b'"'] * 10_000) + b"]}",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("path", [*GENERATING, "/v1/chat/completions", "/v1/responses", "/tokenize", "/invocations"])
def test_broken_bodies(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 1000
    assert SECRET not in answer.text
    assert "/" + "site-packages" not in answer.text


WRONG: list[dict[str, Any]] = [
    {"n": 10**9},
    {"n": "1000000000"},
    {"max_tokens": 10**9},
    {"max_tokens": -1},
    {"stop": ["x"] * 10_000},
    {"stop": ["x" * 10_000]},
    {"stop": [""]},
    {"logprobs": -1},
    {"logprobs": 10**6},
    {"prompt_logprobs": -1},
    {"temperature": -1},
    {"temperature": SECRET},
    {"top_p": 2},
    {"seed": 2**70},
    {"logit_bias": {"1000000": 1}},
    {"prompt": {"a": SECRET}},
    {"prompt": [-1]},
    {"prompt": [384]},
    {"prompt": [2**70]},
    {"prompt": [[5], [384]]},
    {"prompt": "a", "request_id": "a\r\nInjected: 1"},
    {"prompt": "a", "request_id": "a" * 10**6},
    {"prompt_embeds": "AAAA"},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"regex": "(a|aa)+$"}},
    {"min_tokens": 10**9},
    {"truncate_prompt_tokens": 10**9},
    {"best_of": 10**9},
    {"allowed_token_ids": list(range(2000))},
]


@pytest.mark.parametrize("wrong", WRONG, ids=[" ".join(json.dumps(wrong)[:40].split()) for wrong in WRONG])
def test_wrong_completions(server: Server, client: httpx.Client, wrong: dict[str, Any]) -> None:
    body = {"model": str(server.model), "prompt": "a", "max_tokens": 4} | wrong
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 1000
    assert SECRET not in answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("wrong", [{"prompt_token_ids": [-1]}, {"prompt_token_ids": [384]}, {"stop": ["x"] * 10_000}])
def test_wrong_generate(client: httpx.Client, wrong: dict[str, Any]) -> None:
    body = {"prompt": "a"} if "stop" in wrong else {}
    answer = client.post("/generate", json=body | wrong)
    assert answer.status_code == 400
    assert len(answer.text) < 1000


@pytest.mark.parametrize(
    "wrong",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}
            ]
        },
        {"chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}"},
        {"tool_choice": "required"},
        {"top_logprobs": 10**6, "logprobs": True},
    ],
    ids=["media", "template", "tool", "top_logprobs"],
)
def test_wrong_chat(server: Server, client: httpx.Client, wrong: dict[str, Any]) -> None:
    body = {"model": str(server.model), "messages": [{"role": "user", "content": "a"}]} | wrong
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert next(iter(wrong)) in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/scale_elastic_ep", "/inference/v1/abort_requests", "/v1/completions/render"])
def test_routes_that_steer_the_engine_are_not_there(client: httpx.Client, path: str) -> None:
    assert client.post(path, json={}).status_code == 404


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", GENERATING)
def test_a_client_that_leaves_frees_its_place(server: Server, client: httpx.Client, path: str, stream: bool) -> None:
    with ExitStack() as running:
        for _ in range(MAX_NUM_SEQS):
            running.enter_context(RawClient(server)).post(path, long_body(server, path, stream=stream))
        wait_for(client, "vllm:num_requests_running", MAX_NUM_SEQS)
        with RawClient(server) as queued:
            queued.post(path, long_body(server, path, stream=stream))
            wait_for(client, "vllm:num_requests_waiting", 1)
        waited_s = wait_for(client, "vllm:num_requests_waiting", 0)
    stopped_s = wait_for(client, "vllm:num_requests_running", 0)
    print(f"left while queued: {waited_s:.2f} s, while decoding: {stopped_s:.2f} s")


def test_a_client_that_leaves_in_prefill(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vllm:generation_tokens_total")
    for path in GENERATING:
        with RawClient(server) as raw:
            ids = "prompt_token_ids" if path == "/generate" else "prompt"
            raw.post(path, long_body(server, path, stream=True) | {ids: list(range(5, 105)) * 100, "max_tokens": 5000})
    wait_for(client, "vllm:num_requests_running", 0)
    wait_for(client, "vllm:num_requests_waiting", 0)
    assert metric(client, "vllm:generation_tokens_total") - before < 10_000


def test_a_reader_that_stops_reading_is_cut_off(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vllm:generation_tokens_total")
    with RawClient(server, receive_buffer=4096) as raw:
        # Four sequences and twenty logprobs a token, so that the answer does not fit into the buffers on its way.
        body = long_body(server, "/v1/completions", stream=True, logprobs=20, n=MAX_NUM_SEQS, max_tokens=4000)
        raw.post("/v1/completions", body)
        wait_for(client, "vllm:num_requests_running", MAX_NUM_SEQS)
        wait_for(client, "vllm:num_requests_running", 0, within_s=180)
        made = metric(client, "vllm:generation_tokens_total") - before
        assert made < MAX_NUM_SEQS * 4000, "it was served to its end"


def test_a_burst_at_ten_times_the_queue(server: Server, client: httpx.Client) -> None:
    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, limits=limits, headers=headers, timeout=300) as many:
            body = {"ignore_eos": True, "max_tokens": 100}
            ours = {"prompt": "a"} | body
            theirs = {"prompt": "a", "model": str(server.model)} | body
            calls = [many.post("/generate", json=ours), many.post("/v1/completions", json=theirs)]
            for _ in range(5 * MAX_QUEUE - 1):
                calls += [many.post("/generate", json=ours), many.post("/v1/completions", json=theirs)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(burst())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= MAX_NUM_SEQS + MAX_QUEUE
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["type"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    wait_for(client, "vllm:num_requests_waiting", 0)


def test_more_sequences_than_the_server_holds(server: Server, client: httpx.Client) -> None:
    body = {"model": str(server.model), "prompt": ["a"] * 5, "n": 4, "max_tokens": 2}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "20 sequences" in answer.json()["error"]["message"]


def test_key_value_memory_that_runs_out(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vllm:num_preemptions_total")

    async def fill() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300) as many:
            # Three fit when they begin, and do not when they end.
            prompts = [[first, *range(5, 369)] * 18 for first in (5, 6, 7)]
            bodies = [{"prompt_token_ids": ids, "max_tokens": 700, "ignore_eos": True} for ids in prompts]
            return await asyncio.gather(*(many.post("/generate", json=body) for body in bodies))

    for answer in asyncio.run(fill()):
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 700
    assert metric(client, "vllm:num_preemptions_total") > before
    wait_for(client, "vllm:kv_cache_usage_perc", 0)
