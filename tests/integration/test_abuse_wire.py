"""Bytes that no client library sends, to the real engine: refused as documented, and the next request is served."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.integration.conftest import HANG_S, KEY, Server
from tests.integration.raw_http import AUTHORIZED, JSON, RawClient

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("serves_afterwards")]

MIB = 2**20
GENERATING = ["/generate", "/v1/completions"]
# Far less than what a test sends.
MEMORY_SLACK = 48 * MIB


def memory_bytes(server: Server) -> int:
    process = psutil.Process(server.process.pid)
    return sum(child.memory_info().rss for child in [process, *process.children(recursive=True)])


def head(path: str = "/generate", *fields: str) -> str:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", AUTHORIZED.strip(), JSON.strip(), *fields, "", ""])


def test_every_route_wants_the_key(server: Server, client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()["paths"]
    routes = [(method.upper(), path) for path, methods in schema.items() for method in methods]
    assert len(routes) > 15
    routes += [("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/nothing", "/")]
    routes += [("OPTIONS", "/generate"), ("HEAD", "/v1/models"), ("TRACE", "/health/"), ("GET", "/metrics")]
    with httpx.Client(base_url=server.url, timeout=HANG_S) as stranger:
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


@pytest.mark.parametrize("path", [*GENERATING, "/tokenize", "/nothing"])
def test_a_body_that_is_too_large_by_its_length(server: Server, path: str) -> None:
    with RawClient(server) as raw:
        raw.send(head(path, f"Content-Length: {MIB + 1}", "Expect: 100-continue"))
        assert raw.answer()[0] == 413  # before any of it was sent


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_body_where_no_key_is_asked_for(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        with RawClient(server) as raw:
            raw.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
            assert raw.answer()[0] == 413


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


def test_trailers_that_do_not_end(server: Server) -> None:
    before = memory_bytes(server)
    with RawClient(server) as raw:
        raw.send(head("/v1/completions", "Transfer-Encoding: chunked"), "2\r\n{}\r\n0\r\n")
        for _ in range(256):
            if not raw.send(b"a: b\r\n" * 10_000):
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


# By what a client begins with: the answers that it may be given.
DRIPPING = {
    "nothing": ("", {0}),
    "request line": ("GET /health", {408}),
    "headers": ("GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ", {408}),
    "body": (head("/generate", "Content-Length: 100") + '{"prompt": ', {408}),
    "chunk": (head("/generate", "Transfer-Encoding: chunked") + "50\r\n{", {408}),
    "empty lines": ("GET /health HTTP/1.1\r\nHost: x\r\n\r\n", {200}),
}


def drip(server: Server, begun: str) -> int:
    """Go on with a byte now and then until the server closes the connection; the status of its answer, 0 for none."""
    drop = {"": "", "GET /health HTTP/1.1\r\nHost: x\r\n\r\n": "\r\n"}.get(begun, "a")
    with RawClient(server) as raw:
        raw.send(begun)
        begun_s = time.monotonic()
        raw.socket.settimeout(0.5)
        received = b""
        while time.monotonic() < begun_s + HANG_S:
            try:
                data = raw.socket.recv(65536)
            except TimeoutError:
                if drop and not raw.send(drop):
                    break
                continue
            except ConnectionResetError:
                break
            received += data
            if not data:
                break
        else:
            pytest.fail("the connection was kept")
        return int(received.split(b" ", 2)[1]) if received else 0


@pytest.fixture(scope="module")
def dripping(server: Server) -> Iterator[dict[str, Future[int]]]:
    """All of them at once: each waits until the server's patience is over."""
    with ThreadPoolExecutor(len(DRIPPING)) as clients:
        yield {name: clients.submit(drip, server, begun) for name, (begun, _) in DRIPPING.items()}


@pytest.mark.parametrize("name", DRIPPING)
def test_a_client_that_drips(dripping: dict[str, Future[int]], client: httpx.Client, name: str) -> None:
    """A byte now and then wins it no more time, and an empty line behind a request no other one."""
    assert dripping[name].result() in DRIPPING[name][1]
