"""One real pat-serve process with a tiny model, shared by all tests that talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from tests.integration.brake import LATE_S, LAYERS, Brake
from tests.tiny_models import save_tiny_llama

MAX_MODEL_LEN = 16384
# Few enough that a test can fill them: this many sequences run, this many more wait.
MAX_NUM_SEQS, MAX_QUEUE = 4, 12
# Tokens of the tokenizer without a row in the embedding.
ROWLESS = ["<|im_start|>", "<|im_end|>"]
# Named "tests" in logs.
KEY = "integration-key-7f3a"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
# The server shows these fields; the record that pat-export leaves has more.
EXPORT_RECORD = {"method": "pat", "base": {"source": "owner/base"}, "hidden_size": {"base": 86, "exported": 64}}
# A tiny engine is up in 40 s on two idle cores; most of that is imports, which suffer from a busy machine.
START_TIMEOUT_S = 420
# A hang is to fail its own test, before pytest-timeout ends the whole run; this number has no other meaning.
HANG_S = 300


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server: its process, address, model folder, log, and the brake of its engines."""

    process: subprocess.Popen[bytes]
    url: str
    model: Path
    log: Path
    brake: Brake

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=HANG_S, headers={"Authorization": f"Bearer {KEY}"})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def brake_of(log: Path) -> Brake:
    """The brake of the server that writes this log."""
    return Brake(log.with_suffix(".brake"))


def spawn(model: Path | str, port: int, log: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Start pat-serve in a process group of its own, with its output in a file."""
    command = [str(Path(sys.executable).with_name("pat-serve")), "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | brake_of(log).environment(),
            start_new_session=True,
            # A shell without job control has what it runs in the background ignore SIGINT, and so would the server.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            pytest.fail(f"pat-serve ended with {process.returncode}:\n{tail(log)}")
        try:
            if httpx.get(f"{url}/ready", timeout=15).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)  # the pace of polling, not a guess at when it is ready
    pytest.fail(f"pat-serve was not ready after {START_TIMEOUT_S} s:\n{tail(log)}")


@contextmanager
def running(model: Path | str, log: Path, *flags: str) -> Iterator[Server]:
    """A server that is ready, and that is ended if it has not ended by itself."""
    port = free_port()
    process = spawn(model, port, log, *flags)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        yield Server(process=process, url=url, model=Path(model), log=log, brake=brake_of(log))
    finally:
        process.terminate()
        try:
            process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def metric(client: httpx.Client, name: str) -> float:
    """A Prometheus metric that has one set of labels, or none."""
    time.sleep(LATE_S)
    found = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def wait_for(client: httpx.Client, name: str, value: float) -> float:
    """Wait until a metric has a value; returns the seconds that it took."""
    return wait_until(client, name, lambda found: found == value)


def wait_until(client: httpx.Client, name: str, reached: Callable[[float], bool]) -> float:
    """Wait until a metric is as it should be; returns the seconds that it took."""
    begun_s = time.monotonic()
    while not reached(found := metric(client, name)):
        assert time.monotonic() < begun_s + HANG_S, f"{name} is still {found}"
        time.sleep(0.05)  # the pace of polling
    return time.monotonic() - begun_s


def tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny_llama(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=MAX_MODEL_LEN, num_hidden_layers=LAYERS
    )
    (model / "pat_export.json").write_text(json.dumps(EXPORT_RECORD))
    # Tokens were added without resizing the model, an end token among them.
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(ROWLESS, special_tokens=True)
    tokenizer.save_pretrained(model)
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, 385, 99_999]}))
    return model


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Room for one sequence of the greatest length and a quarter; times that a test can wait for.
    flags = ["--dtype", "float32", "--kv-cache-gib", f"{0.01 * LAYERS}", "--api-key", f"tests={KEY}"]
    flags += ["--max-queue", str(MAX_QUEUE)]
    flags += ["--receive-timeout", "6", "--send-timeout", "3", "--max-body-mib", "1", "--log-format", "json"]
    # A tokenizer of a base model has no chat template.
    vllm_flags = ["--max-num-seqs", str(MAX_NUM_SEQS), "--chat-template", CHAT_TEMPLATE]
    # With a slash, as a shell completes a folder's name.
    with running(f"{tiny_model}/", tmp_path_factory.mktemp("server") / "log.txt", *flags, "--", *vllm_flags) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def serves_afterwards(server: Server, client: httpx.Client) -> Iterator[None]:
    """Check after the test that a good request is served, and that the log has neither a key nor a traceback."""
    yield
    assert client.post("/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert client.get("/ready").status_code == 200
    log = server.log.read_text(errors="replace")
    assert KEY not in log
    assert "Traceback" not in log


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the server's log under a failed test."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server):
        report.sections.append(("pat-serve log", tail(server.log)))
    return report
