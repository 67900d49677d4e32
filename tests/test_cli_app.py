"""A command's own work after typer has returned: called on a shallow stack, with the same errors and exit codes."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pat_serve.cli.app import run_command
from pat_serve.errors import EngineError, UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def bare_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pat-x"])


def test_what_is_left_runs_without_typers_frames() -> None:
    modules: list[set[str]] = []

    def command() -> Callable[[], None]:
        modules.append(frames())
        return lambda: modules.append(frames())

    run_command(command)
    below, after = modules
    assert "typer" in below
    assert "typer" not in after


def test_its_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise EngineError("model", expected="a start", found="none", fix="Try again.")

    with pytest.raises(SystemExit) as end:
        run_command(lambda: fail)
    assert end.value.code == EngineError.exit_code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pat-x: model: expected a start")


def test_ctrl_c_ends_it_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(lambda: interrupt)
    assert (end.value.code, capsys.readouterr().err) == (130, "")


def test_nothing_is_left_of_wrong_usage_or_of_help(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    for flag, code in (("--surprise", 2), ("--help", 0)):
        monkeypatch.setattr("sys.argv", ["pat-x", flag])
        with pytest.raises(SystemExit) as end:
            run_command(lambda: lambda: called.append(1))
        assert end.value.code == code
    assert called == []


COMMANDS = ("demo", "eval", "export", "serve", "shapes", "train", "bench")


@pytest.mark.parametrize("where", ["argument", "working directory"])
def test_a_name_that_is_no_utf8_is_refused_by_every_command(where: str, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    name.mkdir()
    given, folder = ([str(name)], tmp_path) if where == "argument" else (["run"], name)
    code = "import sys; from importlib import import_module; import_module(sys.argv.pop(1)).main()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"pat_serve.cli.{command}", *given],
            cwd=folder, text=True, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for command in COMMANDS
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=120)
        [line] = err.splitlines()
        assert f"{where}: expected text in UTF-8, found b'" in line
        assert "caf\\xe9.gguf" in line
        assert process.returncode == UsageError.exit_code


def frames() -> set[str]:
    """Top-level packages of all frames."""
    return {str(frame.frame.f_globals["__name__"]).partition(".")[0] for frame in inspect.stack(context=0)}
