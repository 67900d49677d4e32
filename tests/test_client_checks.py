"""The checks of `make clients`: a fault is printed, and it fails the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.clients.checks import Lines, refusal, whole_emoji

ROOT = Path(__file__).parents[1]


def test_a_failed_check_is_told_and_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def fault() -> None:
        raise ValueError("half\na character")

    lines = Lines("one")
    lines.check("good", lambda: "seen")
    lines.check("bad", fault)
    with pytest.raises(SystemExit) as ended:
        lines.end()
    assert ended.value.code == 1
    assert capsys.readouterr().out == "one | good | ok (seen)\none | bad | FAILED: ValueError: half a character\n"


def test_good_checks_pass_the_run() -> None:
    lines = Lines("one")
    lines.check("good", lambda: None)
    with pytest.raises(SystemExit) as ended:
        lines.end()
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("pieces", "whole"),
    [(["🚀", "\ufffd"], "🚀\ufffd"), (["🚀"], "🚀🌍"), (["a"], "a")],
    ids=["half a character", "less than the whole", "no emoji"],
)
def test_an_emoji_that_is_not_whole_is_found(pieces: list[str], whole: str) -> None:
    assert whole_emoji(["", "🚀", "🌍"], "🚀🌍") == "2 pieces"
    with pytest.raises(AssertionError):
        whole_emoji(pieces, whole)


def test_an_answer_in_place_of_an_error_is_found() -> None:
    with pytest.raises(AssertionError, match="expected KeyError, found an answer"):
        refusal(KeyError, lambda: 200)
    with pytest.raises(ValueError, match="another"):
        refusal(KeyError, lambda: int("another"))


def test_a_missing_environment_is_told_before_a_server_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.clients", "--model", str(tmp_path), "--python", "no/such/python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "found no no/such/python; `make clients` makes it" in done.stderr
