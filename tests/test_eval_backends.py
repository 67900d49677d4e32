from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

from pat_serve.errors import EngineError
from pat_serve.evaluation.backends import BackendSettings, is_url, open_backend

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
