"""The command line of pat-serve and its routes' declaration, without an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
import typer.main
from fastapi import FastAPI

from pat_serve.cli.app import new_app
from pat_serve.cli.serve import serve
from pat_serve.errors import UsageError
from pat_serve.server.http.served_routes import keep_served
from pat_serve.server.routes.plugin import OUR_PATHS, PatServePlugin


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


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "0"],
        ["--port", "70000"],
        ["--kv-cache-gib", "0"],
        ["--surprise"],
        ["--allow", "x"],
        ["--dtype", "float7"],
    ],
)
def test_wrong_usage_exits_with_2(flags: list[str]) -> None:
    assert pat_serve("--model", "m", *flags).returncode == 2


@pytest.mark.parametrize("flag", ["--request-timeout", "--receive-timeout", "--send-timeout", "--shutdown-timeout"])
@pytest.mark.parametrize("value", ["inf", "1e9"])
def test_a_time_without_an_end_is_refused(flag: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}: expected at most 86400 s"):
        typer.main.get_command(serve_app())(["--model", "m", flag, value], standalone_mode=False)


@pytest.mark.parametrize("flag", ["--max-body-mib", "--max-bodies-mib", "--kv-cache-gib"])
def test_a_size_without_an_end_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}: expected a size"):
        typer.main.get_command(serve_app())(["--model", "m", flag, "inf"], standalone_mode=False)


def serve_app() -> typer.Typer:
    app = new_app()
    app.command()(serve)
    return app


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    PatServePlugin().attach_router(app)
    return app


def test_openapi_describes_the_routes(app: FastAPI) -> None:
    schema = app.openapi()
    ours = {"/generate", "/baseline/generate", "/health", "/ready", "/page/model"}
    assert schema["paths"].keys() == ours | {f"/benchmark/{name}" for name in ("latency", "throughput", "speedup")}
    stop = schema["components"]["schemas"]["GenerateRequest"]["properties"]["stop"]
    assert {"type": "string", "minLength": 1, "maxLength": 256} in stop["anyOf"]


def _nothing() -> None: ...


def test_a_route_that_is_not_listed_is_not_served(app: FastAPI) -> None:
    ours = {getattr(route, "path", "") for route in app.routes}
    for path in ("/pause", "/generative_scoring", "/v1/systemone", "/v1/completions", "/metrics/secret"):
        app.post(path)(_nothing)
    keep_served(app, OUR_PATHS)
    assert {getattr(route, "path", "") for route in app.routes} == ours | {"/v1/completions"}
