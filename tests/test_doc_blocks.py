"""Type what the README and the pages tell a reader to type, in a folder with small stand-ins for all that they name."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import write_rows
from tests.doc_blocks import ROOT, Block, all_blocks, blocks_of
from tests.integration.conftest import free_port, tail, wait_until_ready
from tests.speedup_records import latency_result
from tests.test_card import QUALITY, SPEEDUP

BLOCKS = all_blocks()
RUN = [block for block in BLOCKS if not block.not_run]
SLOW = (pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1800))
# The pages name these folders of the repository, and the commands run in another folder.
LINKED = ("configs", "recipes", "deploy", "monitoring", "examples", "benchmarks")
_WRITTEN = re.compile(r"--(?:out|html|csv)[ =]([^\s-]\S*)")


@pytest.fixture(scope="session")
def stand_ins(tiny_base: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make stand-ins for everything that the pages name."""
    from pat_serve.export.exporter import export_run

    folder = tmp_path_factory.mktemp("stand-ins")
    shutil.copytree(finished_run, folder / "run")
    export_run(folder / "run", folder / "pruned")
    for name in ("dense", "meta-llama/Llama-2-7b-hf", "BASE", "MODEL"):
        shutil.copytree(tiny_base, folder / name)
    # There are enough batches of 128 rows for a schedule.
    write_rows(folder / "train.jsonl", 600)
    write_rows(folder / "heldout.jsonl", 16)
    text = "\n".join(f"The list of files has a name and a value, number {number}." for number in range(300))
    (folder / "wiki.test.raw").write_text(text)
    (folder / "manual.txt").write_text(text)
    (folder / "notes.jsonl").write_text('{"text": "A dict maps a key to a value, and a list keeps the order."}\n' * 20)
    (folder / "keys.txt").write_text("alice=secret\n")
    # Measurements of a model of the exported width.
    (folder / "speedup.json").write_text(json.dumps(SPEEDUP))
    (folder / "quality.json").write_text(json.dumps(QUALITY))
    for name in ("dense", "pruned"):
        (folder / f"{name}.json").write_text(
            latency_result(name, faster=1.3 if name == "pruned" else 1).model_dump_json()
        )
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def desk(stand_ins: Path, tmp_path: Path) -> Path:
    """Copy the stand-ins for one block, so that another block does not find its files."""
    return Path(shutil.copytree(stand_ins, tmp_path / "desk", symlinks=True))


def environment() -> dict[str, str]:
    # Scripts come from beside this Python, and modules from these sources. Nothing is fetched.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"PATH": path, "PYTHONPATH": sources, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}


def vacate(command: str, desk: Path) -> None:
    """Remove a stand-in's file where the command will write."""
    for name in _WRITTEN.findall(command):
        target = desk / name
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)


@contextmanager
def served(command: str, port: int, desk: Path) -> Iterator[None]:
    """Run a pat-serve command line from its being ready until it has ended as it should."""
    words = shlex.split(command, comments=True)
    assigned = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(assigned) :]
    if "--port" not in words:
        words[1:1] = ["--port", str(port)]
    words[1:1] = [] if "--kv-cache-gib" in words else ["--kv-cache-gib", "0.25"]
    log = desk / f"serve-{port}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            words, cwd=desk, env=environment() | assigned, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=15).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, tail(log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def type_all(block: Block, desk: Path) -> None:
    """Type every line; a server stays in the background until the block's end or the next server."""
    port = free_port()
    commands = [command.replace("8000", str(port)) for command in block.commands()]
    if block.server:
        commands.insert(0, block.server)
    with ExitStack() as server:
        for command in commands:
            vacate(command, desk)
            if "pat-serve" in shlex.split(command, comments=True)[:2]:
                server.close()
                server.enter_context(served(command, port, desk))
                continue
            # curl alone would call an answer of 400 a success.
            command = re.sub(r"^curl ", "curl --fail-with-body --silent --show-error ", command)
            done = subprocess.run(
                ["bash", "-c", command], cwd=desk, env=environment(), capture_output=True, text=True, check=False
            )
            said = f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            assert done.returncode in block.exit_codes, f"exit code {done.returncode}: {said}"
            assert "Traceback" not in done.stderr, said


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=block.name.rpartition(":")[0] + f"-{index}", marks=SLOW if block.slow else ())
     for index, block in enumerate(RUN)],
)  # fmt: skip
def test_what_is_written_works(block: Block, desk: Path) -> None:
    if block.language == "python":
        command = [sys.executable, "-c", block.text]
        done = subprocess.run(command, cwd=desk, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block.name}\n{done.stderr[-3000:]}"
    else:
        type_all(block, desk)


def test_most_blocks_are_run_and_the_others_say_why() -> None:
    assert len(RUN) >= 15
    assert any(not block.slow for block in RUN)
    for block in BLOCKS:
        for kind, prefix, rest in block.marks:
            assert kind != "not run" or len(rest) > 10, f"{block.name}: a reason, please, not {rest!r} {prefix!r}"
        if block.not_run:
            assert not block.slow, block.name
        elif block.language == "shell":
            assert block.commands(), f"{block.name}: all its lines are left out; mark the block"
            starts_engine = any(
                word in command for command in block.commands() for word in ("pat-serve", "pat-bench speedup")
            )
            assert block.slow or not (starts_engine or block.server), f"{block.name} starts an engine: mark it slow"


def test_marks_are_read_and_a_stray_one_is_noticed() -> None:
    text = (
        "<!-- slow -->\n<!-- not run `pat-eval`: no data here -->\n<!-- may exit 1, 3 -->\n\n"
        "    pat-eval dense/ \\\n      pruned/\n    pat-bench compare a.json   # both\n\nText.\n\n    a formula\n"
        "\n```python\nx = 1\n```\n\n<!-- not run: needs a cluster -->\n```bash\nkubectl apply -f x\n```\n"
    )
    first, second, third = blocks_of(text, "page")
    assert first.commands() == ["pat-bench compare a.json   # both"]
    assert (first.slow, first.exit_codes, first.not_run) == (True, {0, 1, 3}, "")
    assert (second.language, second.marks) == ("python", ())
    assert third.not_run == "needs a cluster"
    with pytest.raises(ValueError, match="no block"):
        blocks_of("<!-- slow -->\n\nText.\n\n    make demo\n", "page")
    with pytest.raises(AssertionError):
        blocks_of("<!-- not run `make demo`: it is long gone -->\n\n    make test\n", "page")[0].commands()
