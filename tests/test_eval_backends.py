from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from pat_serve.errors import EngineError
from pat_serve.evaluation.backends import BackendSettings, is_url, open_backend, vllm_arguments

# In a process of its own: what it adds stays.
ALIAS = """
from importlib.metadata import PackageNotFoundError, version
from pat_serve.evaluation.backends import alias_distribution
before = version("pytest")
alias_distribution("no-such-thing", "pytest", "+cpu")
assert version("no-such-thing") == before + "+cpu"
alias_distribution("numpy", "pytest", "+cpu")
assert version("numpy") != before + "+cpu", "what is there keeps its name"
try:
    version("no-such-thing-either")
except PackageNotFoundError:
    print("fine")
"""


def test_a_distribution_by_another_name():
    done = subprocess.run([sys.executable, "-c", ALIAS], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_urls_are_servers():
    assert is_url("http://127.0.0.1:8000")
    assert not is_url("owner/name")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[broken"])
def test_a_server_that_does_not_answer(url: str):
    pytest.importorskip("lm_eval")
    with pytest.raises((EngineError, httpx.InvalidURL), match="OpenAI-compatible"):
        open_backend(url, None, BackendSettings())


LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "settings", "request_bytes"),
    [
        ({}, {"dtype": "bfloat16"}, 2 << 30),
        ({}, {"dtype": "float32"}, 4 << 30),
        ({"num_key_value_heads": 8, "head_dim": 256}, {"dtype": "bfloat16"}, 1 << 30),
        # Eight heads of keys by its class.
        ({"model_type": "mistral", "max_position_embeddings": 32768}, {"dtype": "bfloat16"}, 4 << 30),
        ({}, {"dtype": "bfloat16", "max_length_tokens": 16}, 0),
        ({"max_position_embeddings": None}, {}, 0),
    ],
)
def test_vllm_on_a_cpu_has_room_for_the_longest_request(
    change: dict[str, Any], settings: dict[str, Any], request_bytes: int, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B, **change}))
    given = BackendSettings(backend="vllm", **settings)
    cache_bytes = vllm_arguments(tmp_path, given, on_gpu=False)["kv_cache_memory_bytes"]
    # A gigabyte at least; never more than two blocks beyond a request.
    assert max(request_bytes, 1 << 30) <= cache_bytes <= max(1.2 * request_bytes, 1 << 30)


def test_vllm_on_a_gpu_sizes_its_cache_itself(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    arguments = vllm_arguments(tmp_path, BackendSettings(backend="vllm"), on_gpu=True)
    assert arguments["kv_cache_memory_bytes"] is None
    assert 0.5 < arguments["gpu_memory_utilization"] < 1
