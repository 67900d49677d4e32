"""The application's arguments and configuration."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pat_serve.errors import MissingExtra, MissingModel, UnsupportedModel, UsageError
from pat_serve.server.cluster.settings import read_settings, server_command
from pat_serve.server.http.policy import Policy

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "deploy/serve_config.yaml").read_text())


def test_arguments_become_the_command_of_a_server(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    # `serve run` hands all arguments on as text.
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
        ({"flags": "-- --api-key secret"}, "--api-key-file"),
        ({"flags": "--dtype float32 -- --max-num-seqs 8 --api_key=secret"}, "--api-key-file"),
        ({"flags": "-- --api-k secret"}, "--api-key-file"),
        ({"flags": "--port=80"}, "http_options"),
        ({"flags": "--dtype 'float32"}, "argument flags"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(model: Path, arguments: dict[str, Any], told: str) -> None:
    known = {"model": str(model)} if arguments else {}
    with pytest.raises(UsageError, match=told) as caught:
        read_settings({**known, **arguments})
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_flags_of_vllm_are_not_taken_for_ours(model: Path) -> None:
    read_settings({"model": str(model), "flags": "-- --port 1 --api-server-count 1"})  # the server itself handles these


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
