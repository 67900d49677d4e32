"""What of the Ray application needs no Ray: its arguments, what is repeated, what a client is told, the relay."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from pat_serve.errors import EngineError, MissingExtra, MissingModel, UnsupportedModel, UsageError
from pat_serve.server.cluster.events import WholeEvents
from pat_serve.server.cluster.proxy import RepeatLost, middlewares, proxy_policy
from pat_serve.server.cluster.relay import Relay
from pat_serve.server.cluster.repeat import may_repeat, says_gone
from pat_serve.server.cluster.replica_server import ReplicaServer
from pat_serve.server.cluster.settings import ReplicaSettings, read_settings, server_command
from pat_serve.server.policy import Policy

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "deploy/serve_config.yaml").read_text())
GONE = json.dumps({"error": {"type": "engine_dead", "message": "", "param": None}}).encode()
JSON, TEXT, EVENTS = b"application/json", b"text/plain", b"text/event-stream; charset=utf-8"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").touch()
    return folder


# Arguments and configuration


def test_arguments_become_the_command_of_a_server(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    # As `serve run` hands them on: text.
    settings = read_settings({"model": "model", "flags": "--dtype float32 -- --max-num-seqs 8", "start_timeout_s": "9"})
    assert (settings.model, settings.start_timeout_s) == (str(model), 9)
    command = server_command(settings, port=1234, parent=77)
    assert command[3] == "77"
    assert Path(command[4]).name == "pat-serve"
    ours = f"--model {model} --port 1234 --dtype float32 -- --max-num-seqs 8"
    assert command[5:] == shlex.split(ours)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "argument model"),
        ({"surprise": 1}, "argument"),
        ({"start_timeout_s": "soon"}, "argument start_timeout_s"),
        ({"flags": "--api-key secret"}, "--api-key-file"),
        ({"flags": "--port=80"}, "http_options"),
        ({"flags": "--dtype 'float32"}, "argument flags"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(model: Path, arguments: dict[str, Any], told: str) -> None:
    known = {"model": str(model)} if arguments else {}
    with pytest.raises(UsageError, match=told) as caught:
        read_settings({**known, **arguments})
    assert "\n" not in str(caught.value)


def test_flags_of_vllm_are_not_taken_for_ours(model: Path) -> None:
    read_settings({"model": str(model), "flags": "-- --api-key x"})  # the server itself handles these


def test_models_that_cannot_be_served_are_refused_before_a_replica_starts(model: Path) -> None:
    with pytest.raises(MissingModel):
        read_settings({"model": "/no/such/folder"})
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        read_settings({"model": str(model)})


def test_configuration_is_valid_and_its_times_hold_the_servers() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs the ray extra").ServeDeploySchema
    [application] = schema.model_validate(CONFIG).applications
    assert application.import_path == "pat_serve.server.cluster.app:build"
    [deployment] = CONFIG["applications"][0]["deployments"]
    words = shlex.split(application.args["flags"])
    assert deployment["graceful_shutdown_timeout_s"] > float(words[words.index("--shutdown-timeout") + 1])
    assert CONFIG["http_options"]["request_timeout_s"] > Policy().request_timeout_s
    assert deployment["max_ongoing_requests"] >= int(words[words.index("--max-num-seqs") + 1])
    assert set(application.args) <= set(read_settings.__annotations__) | {"model", "flags", "start_timeout_s"}
    wrong = json.loads(json.dumps(CONFIG))
    wrong["applications"][0]["deployments"][0]["max_queued_requests"] = 0
    with pytest.raises(ValueError, match="max_queued_requests"):
        schema.model_validate(wrong)


def test_the_deployment_is_the_one_that_the_configuration_names() -> None:
    pytest.importorskip("ray", reason="needs the ray extra")
    from pat_serve.server.cluster.app import PatServe

    assert [PatServe.name] == [each["name"] for each in CONFIG["applications"][0]["deployments"]]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "pat_serve.server.cluster.app", raising=False)
    with pytest.raises(MissingExtra, match=r"pat-serve\[ray\]"):
        importlib.import_module("pat_serve.server.cluster.app")


def test_a_proxy_loads_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys, pat_serve.server.cluster.proxy; print({*sys.modules} & {'torch', 'vllm', 'transformers', 'ray'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# Rules


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


# In the proxy, around an application that stands where Ray Serve's proxy does

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
    """What Ray Serve's proxy does when a replica dies before it answers: nothing."""


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


def read(sent: list[Message]) -> tuple[int, Any, dict[str, str]]:
    start, *rest = sent
    body = b"".join(message["body"] for message in rest)
    assert not rest[-1].get("more_body", False)
    return start["status"], json.loads(body), {name.decode(): value.decode() for name, value in start["headers"]}


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


# The relay, before a server that is cut off


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

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

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
        await relay(scope, None, send)  # type: ignore[arg-type]
        await relay.aclose()
        return sent

    assert read(asyncio.run(ask_nobody()))[0] == 503


# The child


@pytest.mark.parametrize(
    ("flags", "told"),
    [("--surprise", "No such option: --surprise"), ("--log-format x", "expected text, json, found x")],
)
def test_a_server_that_refuses_to_start_is_quoted(model: Path, flags: str, told: str) -> None:
    async def start() -> None:
        server = ReplicaServer(ReplicaSettings(model=str(model), flags=flags))
        assert not server.ended.is_set()
        await server.until_ready()

    with pytest.raises(EngineError, match="ended with 2") as caught:
        asyncio.run(start())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_never_ready_is_given_up_and_stopped(model: Path) -> None:
    async def start() -> None:
        server = ReplicaServer(ReplicaSettings(model=str(model), start_timeout_s=0.01))
        try:
            with pytest.raises(EngineError, match=r"within 0\.01 s"):
                await server.until_ready()
            with pytest.raises(EngineError, match="no answer"):
                await server.check()
        finally:
            await server.stop()
        assert server.ended.is_set()

    asyncio.run(start())


def test_a_child_is_told_when_its_parent_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "told"
    child = (
        f"import signal, time; signal.signal(15, lambda *_: open({str(mark)!r}, 'w').close() or exit()); time.sleep(60)"
    )
    start = (
        "import os, subprocess, sys, time\n"
        "module = ['-m', 'pat_serve.server.cluster.child', str(os.getpid())]\n"
        f"child = subprocess.Popen([sys.executable, *module, sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        process = psutil.Process(int(parent.stdout.readline()))
        deadline_s = time.monotonic() + 30
        # Its own code runs, with its handler, once it sleeps.
        while process.cmdline()[1:2] != ["-c"] or process.cpu_times().user == 0 or process.status() != "sleeping":
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        os.kill(parent.pid, signal.SIGKILL)
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running()
    assert mark.exists()


def test_httpx_knows_what_is_used_of_it() -> None:
    # Built by hand, so that none of the client's own headers is added to a user's.
    request = httpx.Request("GET", "http://a/", headers=[(b"x", b"1")])
    assert {name.lower() for name, _ in request.headers.raw} == {b"host", b"x"}
