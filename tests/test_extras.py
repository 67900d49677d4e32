"""Errors where an optional package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pat_serve.errors import MissingExtra
from pat_serve.machine.extras import require


def test_a_package_that_is_there_is_no_obstacle():
    require("json", "bench", wanted_by="--html")


def test_a_missing_one_is_named_with_every_way_out():
    with pytest.raises(MissingExtra) as caught:
        require("no_such_module", "cpu", "cuda", wanted_by="--backend vllm", otherwise="use --backend hf")
    assert str(caught.value) == (
        "--backend vllm: expected the packages of the cpu or cuda extra, found no module no_such_module. "
        'Install them: pip install "pat-serve[cpu]" or "pat-serve[cuda]", or use --backend hf.'
    )


# The base installation alone: what the extras bring cannot be found.
BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastapi", "starlette", "uvicorn", "vllm", "guidellm", "plotly", "lm_eval"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import pat_serve.machine.extras
pat_serve.machine.extras.find_spec = lambda module: None
command, *sys.argv[1:] = sys.argv[1:]
__import__(f"pat_serve.cli.{command}", fromlist=["main"]).main()
"""


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("serve --model tiny", "cpu or cuda"),
        ("bench speedup --baseline llama2-7b --candidate llama2-7b-pat25", "cpu or cuda"),
        ("bench latency --model llama2-7b", "cpu or cuda"),
        ("bench throughput --model llama2-7b", "cpu or cuda"),
        ("bench speculative --model llama2-7b --draft llama2-7b-pat25", "cpu or cuda"),
        ("bench load", "bench"),
        ("bench compare some.json --html page.html", "bench"),
        ("eval tiny --tasks arc_easy", "eval"),
    ],
)
def test_every_command_says_so_in_a_base_installation(command: str, extra: str):
    done = subprocess.run([sys.executable, "-c", BARE, *command.split()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"expected the packages of the {extra} extra" in done.stderr, done.stderr
