"""LiteLLM's proxy before the server, asked with OpenAI's package."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.clients.checks import WRONG_KEY, Lines, Target, target
from benchmarks.clients.openai_sdk import Checks

_START_S = 180.0


@contextmanager
def proxy(server: Target) -> Iterator[str]:
    """Start the proxy, which takes the server's own key from its users, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # JSON is YAML.
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"hosted_vllm/{server.model}", "api_base": f"{server.url}/v1", "api_key": key,
                "max_retries": 0,
            },
        }
        for name, key in ((server.model, server.key), ("busy", server.busy_key), ("stranger", WRONG_KEY))
    ]  # fmt: skip
    # By default the proxy repeats, and takes a model out of service for a while after an error.
    settings = {
        "model_list": models,
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        "general_settings": {"master_key": server.key},
    }
    with tempfile.TemporaryDirectory() as scratch:
        config, log = Path(scratch) / "config.yaml", Path(scratch) / "log"
        config.write_text(json.dumps(settings), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("litellm")), "--config", str(config), "--host", "127.0.0.1"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--port", str(port), "--telemetry", "False"],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + _START_S
        try:
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"the proxy did not start: {log.read_text(errors='replace')[-1500:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/liveliness", timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def main() -> None:
    """Run the checks."""
    server, lines = target(), Lines("litellm proxy")
    try:
        with proxy(server) as url:
            Checks(server, f"{url}/v1", proxied=True).run(lines)
    except RuntimeError as error:
        told = error

        def start() -> None:
            raise told

        lines.check("start", start)
    lines.end()


if __name__ == "__main__":
    main()
