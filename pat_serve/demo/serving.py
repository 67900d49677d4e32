"""Serve the dense and the pruned model with the real server, ask both the same questions, and time them."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pat_serve.errors import EngineError
from pat_serve.terminal.progress import say

START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
KV_CACHE_GIB = "0.25"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running pat-serve process and its address."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str


@contextmanager
def servers(models: dict[str, list[str]], logs: Path) -> Iterator[dict[str, Server]]:
    """Start one pat-serve a model, together, and stop them all at the end, whatever happens.

    Args:
        models: checkpoints by name, each followed by further flags.
        logs: folder for their output.

    Raises:
        EngineError: a server did not get ready.
    """
    started: dict[str, Server] = {}
    try:
        for name, model in models.items():
            started[name] = _start(name, model, logs)
        for server in started.values():
            _wait_until_ready(server)
        yield started
    finally:
        for server in started.values():
            server.process.send_signal(signal.SIGTERM)
        for server in started.values():
            try:
                server.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # The server has its own group, so that no engine process is left behind.
                os.killpg(server.process.pid, signal.SIGKILL)


def ask(server: Server, prompt: str) -> dict[str, Any]:
    """Ask for one greedy completion over /generate, to the end of its line."""
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0.0, "stop": ["\n"]}
    answer: dict[str, Any] = post(server, "/generate", body)
    return answer


def latency(server: Server) -> dict[str, Any]:
    """Measure TTFT and TPOT over /benchmark/latency, in seconds."""
    body = {"batch_size": 1, "prompt_tokens": 128, "output_tokens": 32, "rounds": 5, "warmup": 1}
    figures: dict[str, Any] = post(server, "/benchmark/latency", body)
    return figures


def _start(name: str, model: list[str], logs: Path) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = logs / f"pat-serve-{name}.log"
    arguments = ["--model", *model, "--port", str(port), "--kv-cache-gib", KV_CACHE_GIB]
    command = [str(Path(sys.executable).with_name("pat-serve")), *arguments]
    say(f"  $ pat-serve {shlex.join(arguments)}")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    return Server(name=name, process=process, log=log, url=f"http://127.0.0.1:{port}")


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/ready", timeout=10, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.5)
    tail = server.log.read_text(errors="replace").strip().splitlines()[-1:]
    raise EngineError(
        f"pat-serve for the {server.name} model",
        expected=f"/ready to answer 200 within {START_TIMEOUT_S:.0f} s",
        found=tail[0] if tail else "no output",
        fix=f"Read {server.log}.",
    )


def post(server: Server, route: str, body: dict[str, Any]) -> Any:
    """Post to a server and return its JSON answer.

    Raises:
        EngineError: the answer is not 200.
    """
    response = httpx.post(f"{server.url}{route}", json=body, timeout=600, trust_env=False)
    if response.status_code != httpx.codes.OK:
        raise EngineError(
            f"{route} of the {server.name} model",
            expected="200",
            found=f"{response.status_code} {response.text[:200]}",
            fix=f"Read {server.log}.",
        )
    return response.json()
