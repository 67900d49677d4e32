"""The image, built and run for real: `make docker-test`. Needs a Docker engine, so no other target runs it.

The container shares the host's network, so that engines without a bridge do. IMAGE names a built image to test instead.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pat_serve.demo.real.model import FILE

# The first of them waits for the build, which trains the built-in model.
pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
# The Dockerfile's default, or what the build was given.
BASE_IMAGE = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
KEY = "first-key-of-this-test"


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def image() -> str:
    if name := os.environ.get("IMAGE"):
        return name
    # The classic builder, too, stops at the target.
    base = ["--build-arg", f"BASE_IMAGE={BASE_IMAGE}"]
    build = ["docker", "build", "--network", "host", *base, "--target", "cpu", "--tag", "pat-serve", str(ROOT)]
    started = time.monotonic()
    subprocess.run(build, check=True)
    print(f"built in {time.monotonic() - started:.0f} s")
    return "pat-serve"


def holds_the_chat_model(name: str) -> bool:
    """Whether the image holds the pretrained chat model, as NOTICE and the export's record both say."""
    notice = docker("exec", name, "cat", "/model/NOTICE")
    record: dict[str, Any] = json.loads(docker("exec", name, "cat", "/model/pat_export.json"))
    if (source := record["base"]["source"]) == FILE:
        assert notice.startswith("SmolLM2-135M-Instruct, pruned.")
        assert "Apache License" in docker("exec", name, "head", "-n", "2", "/model/LICENSE")
        return True
    assert (source, notice.splitlines()[0]) == ("base", "The small demo's model, pruned.")
    return False


@pytest.fixture(scope="session")
def container(image: str) -> Iterator[tuple[str, str]]:
    """Name and address of a container with nothing that it does not need."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = f"pat-serve-test-{port}"
    guarded = [
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
    ]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-gib", "0.25"]
    environment = ["--env", f"PAT_SERVE_API_KEYS=tester={KEY}"]
    docker("run", "--detach", "--name", name, "--network", "host", *guarded, *environment, image, *flags)
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while not _ready(url):
            assert docker("inspect", "--format", "{{.State.Running}}", name) == "true", docker("logs", name)
            assert time.monotonic() - started < 600, docker("logs", name)
            time.sleep(0.5)
        size_bytes = int(docker("image", "inspect", "--format", "{{.Size}}", image))
        print(f"image {size_bytes / 1e9:.2f} GB; ready after {time.monotonic() - started:.0f} s")
        yield name, url
    finally:
        docker("rm", "--force", name)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=20).status_code == 200
    except httpx.TransportError:
        return False


def test_it_answers(container: tuple[str, str]) -> None:
    _, url = container
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "Return a new dictionary", "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{url}/generate", json=body, headers=headers, timeout=60).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] > 0
    api = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    [model] = api.models.list()
    completion = api.completions.create(model=model.id, prompt=body["prompt"], max_tokens=12, temperature=0)
    assert completion.choices[0].text == answer["text"]
    assert httpx.post(f"{url}/generate", json=body, timeout=60).status_code == 401


def test_it_talks_where_its_model_does(container: tuple[str, str]) -> None:
    name, url = container
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    answer = httpx.post(f"{url}/generate", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    if not holds_the_chat_model(name):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        return
    print(f"What is the capital of France? {answer.json()['text']}")
    # A turn that begins and goes on; what a cut model knows is not for a test to say.
    assert answer.json()["text"].strip()
    assert answer.json()["usage"]["prompt_tokens"] > 7


def test_the_model_is_a_pruned_one(container: tuple[str, str]) -> None:
    name, _ = container
    record: dict[str, Any] = json.loads(docker("exec", name, "cat", "/model/pat_export.json"))
    assert record["parameters"]["exported"] < 0.8 * record["parameters"]["base"]
    assert record["parity"]["passed"]


def test_it_is_nobody_and_has_no_compiler(container: tuple[str, str]) -> None:
    name, _ = container
    assert docker("exec", name, "id", "-u") == "10001"
    compilers = "for c in cc gcc g++ clang; do command -v $c; done; true"
    # The image adds no compiler to those of its base (python:3.11-slim has none).
    brought = docker("run", "--rm", "--network", "none", "--entrypoint", "sh", BASE_IMAGE, "-c", compilers)
    assert docker("exec", name, "sh", "-c", compilers) == brought
    assert docker("exec", name, "touch", "/opt/venv/x", check=False) == ""
    assert docker("exec", name, "sh", "-c", "test -e /opt/venv/x || echo absent") == "absent"


def test_the_health_check_says_so(container: tuple[str, str]) -> None:
    name, _ = container
    deadline = time.monotonic() + 120
    while (status := docker("inspect", "--format", "{{.State.Health.Status}}", name)) != "healthy":
        assert time.monotonic() < deadline, status
        time.sleep(1)


def test_sigterm_ends_it(container: tuple[str, str]) -> None:
    name, _ = container
    docker("stop", "--time", "60", name)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", name) == "0", docker("logs", name)
