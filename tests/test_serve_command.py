"""The command line of pat-serve and its routes' declaration, without an engine."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from pat_serve.server.api_key import check_api_key
from pat_serve.server.http_errors import HttpError
from pat_serve.server.plugin import PatServePlugin


def pat_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("pat-serve")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_shows_an_example_and_imports_neither_torch_nor_vllm() -> None:
    shown = pat_serve("--help")
    assert shown.returncode == 0
    assert "pat-serve --model pruned/ --port 8000" in shown.stdout
    code = "import sys, pat_serve.cli.serve; print({*sys.modules} & {'torch', 'vllm', 'transformers', 'fastapi'})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_word_without_a_flag_is_one_line() -> None:
    refused = pat_serve("--model", "m", "pruned/")
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith("pat-serve: pruned/: expected flags only")


@pytest.mark.parametrize("flags", [["--port", "0"], ["--port", "70000"], ["--kv-cache-gib", "0"], ["--surprise"]])
def test_wrong_usage_exits_with_2(flags: list[str]) -> None:
    assert pat_serve("--model", "m", *flags).returncode == 2


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    PatServePlugin().attach_router(app)
    app.state.args = Namespace(api_key=["first", "second"])
    return app


def test_openapi_describes_the_routes(app: FastAPI) -> None:
    schema = app.openapi()
    assert {"/generate", "/health", "/ready", "/benchmark/latency", "/benchmark/throughput"} == schema["paths"].keys()
    stop = schema["components"]["schemas"]["GenerateRequest"]["properties"]["stop"]
    assert {"type": "string"} in stop["anyOf"]


@pytest.mark.parametrize(
    "path", ["/generate", "/benchmark/latency", "/metrics", "/invocations", "/v1/completions", "//health", "/docs"]
)
def test_every_route_but_the_probes_wants_the_key(app: FastAPI, path: str) -> None:
    client = TestClient(app)
    answer = client.post(path, json={}, headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "unauthorized"
    assert client.get("/health").status_code == 200
    assert client.post(path, json={}, headers={"Authorization": "Bearer second"}).status_code != 401


def test_any_of_the_keys_opens() -> None:
    check_api_key(None, [])
    check_api_key("Bearer second", ["first", "second"])
    check_api_key("bearer first", ["first", "second"])
    for wrong in (None, "", "Bearer", "Bearer third", "first", "Basic first", "Bearer first second"):
        with pytest.raises(HttpError):
            check_api_key(wrong, ["first", "second"])
