"""A pat-serve of its own for each model, with so much memory for its KV cache."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from pat_serve.errors import EngineError
from pat_serve.server.engine.workers.process_group import ProcessGroup

_START_TIMEOUT_S, _STOP_TIMEOUT_S, _POLL_S = 900.0, 60.0, 0.2


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A server that is ready.

    Attributes:
        url: its address.
        ready_s: time from its start until it was ready.
        processes: all of its processes.
    """

    url: str
    ready_s: float
    processes: ProcessGroup


@contextmanager
def serving(model: str, *, kv_cache_bytes: int, max_model_tokens: int, dtype: str, log: Path) -> Iterator[Serving]:
    """Start a server without keys on this machine's own address, and stop it at the end, whatever happens.

    Args:
        model: folder.
        kv_cache_bytes: for keys and values.
        max_model_tokens: prompt and output of the longest request.
        dtype: of what is not quantised.
        log: file for all that the server writes.

    Raises:
        EngineError: the server did not get ready; its log is kept where the caller keeps it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-c", "from pat_serve.cli.serve import main; main()", "--model", model]
    command += ["--port", str(port), "--dtype", dtype, "--max-model-len", str(max_model_tokens)]
    command += ["--kv-cache-gib", repr(kv_cache_bytes / 2**30), "--", "--no-enable-prefix-caching"]
    begun_s, url = time.monotonic(), f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "PAT_SERVE_API_KEYS"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        _wait_until_ready(model, process, url, begun_s + _START_TIMEOUT_S, log)
        own = psutil.Process(process.pid)
        group = ProcessGroup([own, *own.children(recursive=True)])
        yield Serving(url=url, ready_s=time.monotonic() - begun_s, processes=group)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # The server has its own group, so that no engine process is left behind.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(model: str, process: subprocess.Popen[bytes], url: str, deadline_s: float, log: Path) -> None:
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=10, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(_POLL_S)
    said = log.read_text(errors="replace").strip().splitlines()[-8:]
    raise EngineError(
        f"pat-serve --model {model}",
        expected=f"a server that is ready within {_START_TIMEOUT_S:.0f} s",
        found="none" if process.poll() is None else f"exit code {process.returncode}",
        fix="It says:\n" + "\n".join(said),
    )
