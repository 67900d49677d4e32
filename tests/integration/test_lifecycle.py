"""How a server starts, refuses to start, and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.conftest import (
    HANG_S,
    KEY,
    MAX_MODEL_LEN,
    START_TIMEOUT_S,
    free_port,
    running,
    spawn,
    tail,
    wait_for,
)
from tests.integration.raw_http import RawClient

pytestmark = pytest.mark.vllm

AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
STREAMS = 8
LONG = MAX_MODEL_LEN - 10


def members(session: int) -> dict[int, str]:
    """Command lines of the living processes of a session; a zombie has ended and only waits for its parent."""
    found = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def pid_of(session: int, name: str) -> int:
    [pid] = [pid for pid, line in members(session).items() if name in line]
    return pid


def wait_until_gone(session: int) -> None:
    deadline_s = time.monotonic() + HANG_S
    while members(session):
        assert time.monotonic() < deadline_s, members(session)
        time.sleep(0.05)


def check_ended(process: subprocess.Popen[bytes], exit_code: int, log: Path) -> None:
    assert process.wait(HANG_S) == exit_code, tail(log)
    # Python's resource tracker ends by itself, a moment after the process that it watches.
    wait_until_gone(process.pid)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


class Stream(threading.Thread):
    """A streamed generation that is read to its end; `flowing` after its first event."""

    def __init__(
        self, url: str, *, path: str = "/generate", tokens: int = MAX_MODEL_LEN - 10, model: Path | None = None
    ):
        super().__init__(daemon=True)
        self.url = url + path
        self.body: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
        self.body |= {"prompt_token_ids": [5]} if path == "/generate" else {"model": str(model), "prompt": [5]}
        self.flowing = threading.Event()
        self.status = 0
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self.url, json=self.body, timeout=HANG_S, headers=AUTHORIZATION) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)
                    self.flowing.set()

    def end(self) -> list[str]:
        """The last two events of a stream."""
        self.join(HANG_S)
        assert not self.is_alive()
        return self.lines[-2:]


class Whole(threading.Thread):
    """A generation by vLLM's own route, without streaming."""

    def __init__(self, url: str, model: Path):
        super().__init__(daemon=True)
        self.url, self.model = url, model
        self.answer: httpx.Response | httpx.TransportError | None = None
        self.start()

    def run(self) -> None:
        body = {"max_tokens": MAX_MODEL_LEN - 10, "ignore_eos": True, "model": str(self.model), "prompt": [5]}
        try:
            self.answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=HANG_S, headers=AUTHORIZATION)
        except httpx.TransportError as error:
            self.answer = error


def until_status(url: str, status: int, **call: Any) -> httpx.Response:
    """Ask until the answer has a status."""
    deadline_s = time.monotonic() + HANG_S
    while True:
        answer = httpx.request(
            call.get("method", "GET"), url, timeout=HANG_S, json=call.get("json"), headers=AUTHORIZATION
        )
        if answer.status_code == status:
            return answer
        assert time.monotonic() < deadline_s, (answer.status_code, answer.text)
        time.sleep(0.1)


# Beside other engines uvicorn's own grace time can run out before ours, and it then logs a traceback.
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_requests_finish_and_a_second_one_ends_them(
    tiny_model: Path, log: Path, number: signal.Signals
) -> None:
    flags = ["--kv-cache-gib", "0.25", "--shutdown-timeout", "600"]
    with running(tiny_model, log, *flags) as started, started.brake.held():
        process, url = started.process, started.url
        assert len(members(process.pid)) >= 4  # supervisor, server, engine, worker: else this test would see nothing
        # Many, because a busy event loop may stop reading the engine's output before it learns that the engine aborts.
        streams = [Stream(url) for _ in range(STREAMS)]
        short = Stream(url, tokens=30)
        for stream in [*streams, short]:
            assert stream.flowing.wait(HANG_S)
        with RawClient(started, receive_buffer=4096) as deaf:
            deaf.post("/generate", streams[0].body)
            # To the whole group, as Ctrl-C in a terminal.
            os.killpg(process.pid, number)
            refused = until_status(f"{url}/generate", 503, method="POST", json={"prompt": "a", "max_tokens": 1})
            assert refused.json()["error"]["type"] == "stopping"
            assert "retry-after" in refused.headers
            assert httpx.get(f"{url}/health", timeout=HANG_S).status_code == 200
            assert httpx.get(f"{url}/ready", timeout=HANG_S).status_code == 503
            last, done = short.end()
            assert '"finish_reason":"length"' in last
            assert done == "data: [DONE]"
            assert all(stream.is_alive() for stream in streams)
            process.send_signal(signal.SIGTERM)
            ends = [stream.end() for stream in streams]
            assert {end[-1] for end in ends} == {"data: [DONE]"}  # the streams are ended, not torn
            assert any('"abort"' in end[-2] for end in ends)
            check_ended(process, 0, log)
        assert "Traceback" not in log.read_text()


# The next two need an engine that answers within seconds while streams flow: not beside other engines on two cores.
@pytest.mark.slow
def test_a_deadline_ends_a_request_and_gives_its_place_back(tiny_model: Path, log: Path) -> None:
    with running(tiny_model, log, "--kv-cache-gib", "0.25", "--request-timeout", "10") as started:
        url = started.url
        # An engine has work at its first requests alone, which must not fall into the time of the observed ones.
        for warm in [Stream(url, tokens=8), Stream(url, path="/v1/completions", model=tiny_model, tokens=8)]:
            warm.end()
        with started.brake.held(), httpx.Client(base_url=url, timeout=HANG_S) as client:
            streams = [Stream(url), Stream(url, path="/v1/completions", model=tiny_model)]
            for stream in streams:
                ending = stream.end()
                # The status line waits for the first token; a machine that had none in 10 s says it there.
                assert '"deadline"' in ending[0 if stream.status == 200 else -1], (stream.status, ending)
                assert (stream.status, ending[-1]) == (200, "data: [DONE]") or stream.status == 504, ending
            wait_for(client, "vllm:num_requests_running", 0)
            for path in ("/generate", "/v1/completions"):
                late = client.post(path, json=streams[path != "/generate"].body | {"stream": False})
                assert (late.status_code, late.json()["error"]["type"]) == (504, "deadline")
                wait_for(client, "vllm:num_requests_running", 0)


@pytest.mark.slow
def test_a_key_s_bound_and_an_engine_that_stops_and_dies(tiny_model: Path, log: Path) -> None:
    # No deadline comes near, however slow the machine: only the kill can end these streams.
    flags = ["--kv-cache-gib", "0.25", "--request-timeout", "3600", "--max-concurrency-per-key", "3"]
    with running(tiny_model, log, *flags, "--api-key", f"tests={KEY}") as started, started.brake.held():
        process, url = started.process, started.url
        whole = Whole(url, tiny_model)
        streams = [Stream(url), Stream(url, path="/v1/completions", model=tiny_model)]
        for stream in streams:
            assert stream.flowing.wait(HANG_S)
        refused = httpx.post(f"{url}/generate", json={"prompt": "a"}, timeout=HANG_S, headers=AUTHORIZATION)
        found = [(stream.status, stream.is_alive(), stream.lines[-2:]) for stream in streams]
        assert refused.status_code == 429, (refused.text, found)
        assert refused.json()["error"]["type"] == "too_many_requests"
        assert "retry-after" in refused.headers
        # Stopped, and going on.
        engine = pid_of(process.pid, "EngineCore")
        os.kill(engine, signal.SIGSTOP)
        until_status(f"{url}/ready", 503)
        assert httpx.get(f"{url}/health", timeout=HANG_S).status_code == 200
        os.kill(engine, signal.SIGCONT)
        until_status(f"{url}/ready", 200)
        # Killed.
        assert all(stream.is_alive() for stream in streams)
        os.kill(engine, signal.SIGKILL)
        killed_s = time.monotonic()
        for stream in streams:
            last, done = stream.end()
            assert '"error"' in last
            assert "deadline" not in last
            assert done == "data: [DONE]"
        whole.join(HANG_S)
        # The server may be gone before it has answered, but it does not answer anything else.
        if isinstance(whole.answer, httpx.Response):
            assert (whole.answer.status_code, whole.answer.json()["error"]["type"]) == (503, "engine_dead")
            assert "retry-after" in whole.answer.headers
        else:
            assert isinstance(whole.answer, httpx.TransportError)
        check_ended(process, 1, log)
        print(f"ended {time.monotonic() - killed_s:.1f} s after its engine")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["supervisor", "server"])
def test_a_killed_parent_leaves_no_process(tiny_model: Path, log: Path, victim: str) -> None:
    with running(tiny_model, log, "--kv-cache-gib", "0.25", "--shutdown-timeout", "600") as started:
        process = started.process
        [server] = psutil.Process(process.pid).children()
        connection = RawClient(started)
        connection.post("/generate", {"prompt": "a", "max_tokens": MAX_MODEL_LEN - 10, "ignore_eos": True})
        os.kill(process.pid if victim == "supervisor" else server.pid, signal.SIGKILL)
        assert process.wait(HANG_S) == (-signal.SIGKILL if victim == "supervisor" else 128 + signal.SIGKILL)
        wait_until_gone(process.pid)


def test_sigterm_while_the_engine_starts_leaves_no_process(tiny_model: Path, log: Path) -> None:
    process = spawn(tiny_model, free_port(), log, "--kv-cache-gib", "0.25")
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not any("EngineCore" in line for line in members(process.pid).values()):
            assert time.monotonic() < deadline_s, tail(log)
            assert process.poll() is None, tail(log)
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        check_ended(process, 0, log)
    finally:
        process.kill()


def test_port_in_use_is_told_before_the_engine_starts(tiny_model: Path, log: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        process = spawn(tiny_model, port, log)
        check_ended(process, 2, log)
    [line] = log.read_text().splitlines()
    assert f"127.0.0.1:{port}" in line
    assert "already in use" in line
    assert "--port" in line


def test_a_bad_tls_key_is_told_before_the_engine_starts(tiny_model: Path, log: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for path in (certificate, key):
        path.write_text("-----BEGIN NOTHING-----")
    process = spawn(tiny_model, free_port(), log, "--", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    # vLLM reads the command line before, and its imports take their time.
    process.wait(START_TIMEOUT_S)
    check_ended(process, 2, log)
    line = log.read_text().splitlines()[-1]
    assert f"--ssl-certfile {certificate} and --ssl-keyfile {key}: expected a certificate and its private key" in line
    assert "EngineCore" not in log.read_text()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_missing_model_is_told_before_the_engine_starts(tmp_path: Path, log: Path, kind: str) -> None:
    model = tmp_path / "model"
    if kind == "empty":
        model.mkdir()
    if kind == "file":
        model.write_text("weights")
    process = spawn(model, free_port(), log)
    check_ended(process, 1, log)
    [line] = log.read_text().splitlines()
    assert str(model) in line
    found = {"missing": "no such folder", "empty": "a folder without one", "file": "another file"}
    assert f"found {found[kind]}" in line
