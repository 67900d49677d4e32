"""How a server starts, refuses to start, and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.conftest import MAX_MODEL_LEN, free_port, spawn, tail, wait_until_ready

pytestmark = pytest.mark.vllm

STOP_TIMEOUT_S = 20
STREAMS = 8


def members(group: int) -> list[str]:
    """Command lines of the living processes of a process group; a zombie has ended and only waits for its parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def check_ended(process: subprocess.Popen[bytes], exit_code: int, log: Path) -> None:
    assert process.wait(STOP_TIMEOUT_S) == exit_code, tail(log)
    # Python's resource tracker ends by itself, a moment after the process that it watches.
    deadline_s = time.monotonic() + 5
    while members(process.pid):
        assert time.monotonic() < deadline_s, members(process.pid)
        time.sleep(0.05)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def test_sigterm_under_load_leaves_no_process(tiny_model: Path, log: Path) -> None:
    port = free_port()
    process = spawn(tiny_model, port, log, "--kv-cache-gib", "0.25")
    flowing = threading.Semaphore(0)

    def stream(_: int) -> list[str]:
        body = {"prompt_token_ids": [5], "max_tokens": MAX_MODEL_LEN - 10, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/generate", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            flowing.release()
            return [line for line in lines if line]

    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        assert len(members(process.pid)) >= 3  # server, engine, worker: otherwise this test would see nothing
        # Many, because a busy event loop may stop reading the engine's output before it learns that the engine aborts.
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = [pool.submit(stream, index) for index in range(STREAMS)]
            for _ in streams:
                assert flowing.acquire(timeout=60)
            process.send_signal(signal.SIGTERM)
            ends = [future.result() for future in streams]
        assert {end[-1] for end in ends} == {"data: [DONE]"}  # the streams are ended, not torn
        assert any('"abort"' in end[-2] for end in ends)
        check_ended(process, 0, log)
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


def test_sigterm_while_the_engine_starts_leaves_no_process(tiny_model: Path, log: Path) -> None:
    process = spawn(tiny_model, free_port(), log, "--kv-cache-gib", "0.25")
    try:
        deadline_s = time.monotonic() + 120
        while not any("EngineCore" in line for line in members(process.pid)):
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
    found = {"missing": "no such folder", "empty": "a folder without one", "file": "a file"}
    assert f"found {found[kind]}" in line
