"""A server under measurement, ours or plain vLLM's, as a process of its own; and a client that costs little."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "benchmark-key"
OURS = "from pat_serve.cli.serve import main; main()"
# `vllm serve` runs this. The command itself asks for a distribution called vllm, which the CPU build does not have.
PLAIN = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
_START_S = 420
_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers.

    Attributes:
        process: its first process.
        port: on 127.0.0.1.
        ready_s: from the start of the process until a request was answered.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int
    ready_s: float


@contextmanager
def serving(name: str, model: Path, log: Path, *, vllm_flags: list[str], flags: list[str]) -> Iterator[Served]:
    """Start a server and end it.

    Args:
        name: "pat-serve" or "vllm".
        model: folder.
        log: file for all that it writes.
        vllm_flags: for either.
        flags: for pat-serve alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    ours = ["-c", OURS, *common, "--api-key", f"bench={KEY}", *flags, "--", *vllm_flags]
    command = [sys.executable, *(ours if name == "pat-serve" else ["-c", PLAIN, *common, *vllm_flags])]
    # The end of the measurement ends the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # By default vLLM reports its use to its makers' server.
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    begun_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > begun_s + _START_S:
                raise SystemExit(f"{name} did not start; its last words:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(_POLL_S)
        yield Served(name=name, process=process, port=port, ready_s=time.monotonic() - begun_s)
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(port: int) -> bool:
    try:
        client = Client(port, timeout_s=30)
        return client.get("/health")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


class Client:
    """One connection that is kept, for one thread."""

    def __init__(self, port: int, *, timeout_s: float = 120) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        self.headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

    def get(self, path: str) -> tuple[int, bytes]:
        """Get a path; return status and body."""
        self.connection.request("GET", path, headers=self.headers)
        answer = self.connection.getresponse()
        return answer.status, answer.read()

    def send(self, path: str, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        """Post, and wait for the headers of the answer."""
        # A server may answer before it has read the body, and close; the answer says why.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.request("POST", path, json.dumps(body), self.headers)
        return self.connection.getresponse()

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Post a body; return status and answer, after a stream's end."""
        answer = self.send(path, body)
        return answer.status, answer.read()
