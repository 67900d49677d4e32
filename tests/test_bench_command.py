"""pat-bench's command line, up to where an engine would start."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pat_serve.cli.bench import app
from pat_serve.errors import OutputExists, UsageError

SHAPES = ("--baseline", "llama2-7b", "--candidate", "llama2-7b-pat25", "--load-format", "dummy")


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for command in ("latency", "throughput", "speedup", "load", "compare", "speculative"):
        assert command in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speedup", *SHAPES, "--batch-size", "0"), "--batch-size"),
        (("speedup", *SHAPES, "--batch-size", "1,x"), "--batch-size"),
        (("speedup", *SHAPES, "--regime", "both,none"), "--regime"),
        (("speedup", *SHAPES, "--margin", "2"), "--margin"),
        (("speedup", *SHAPES, "--layers", "2,x"), "--layers"),
        (("speedup", *SHAPES, "--layers", "2,33"), "1 to 32"),
        (("speedup", *SHAPES, "--layers", "2,6", "--paper"), "one depth beside --paper"),
        (("speedup", *SHAPES, "--layers", "2,6", "--fixed-memory"), "one depth beside --fixed-memory"),
        (("speedup", *SHAPES, "--precision", "0"), "--precision"),
        (("speedup", *SHAPES, "--precision", "1.5"), "--precision"),
        (("speedup", *SHAPES, "--precision", "0.1", "--max-rounds", "6"), "--max-rounds"),
        (("speedup", *SHAPES, "--precision", "0.1", "--max-minutes", "0"), "--max-minutes"),
        (("speedup", *SHAPES, "--fixed-memory", "--batch-size", "1,2"), "--fixed-memory"),
        (("latency", "--model", "llama2-7b", "--prompt-tokens", "-3"), "--prompt-tokens"),
        (("latency", "--model", "llama2-7b", "--batch-size", "16384"), "--batch-size"),
        (("latency", "--model", "llama2-7b", "--batch-size", "20000"), "--batch-size"),
        (("throughput", "--model", "llama2-7b", "--concurrency", ""), "--concurrency"),
        (("load", "--slo", "ttft"), "--slo"),
        (("load", "--slo", "speed=1"), "--slo speed"),
        (("load", "--rate", "fast"), "--rate"),
        (("load", "--profile", "burst"), "--profile"),
    ],
)
def test_wrong_usage_names_the_flag(arguments: tuple[str, ...], message: str) -> None:
    error = CliRunner().invoke(app, list(arguments)).exception
    assert isinstance(error, UsageError), error
    assert message in str(error)


def test_an_output_that_is_there_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    there = tmp_path / "result.json"
    there.touch()
    for command in (("speedup", *SHAPES), ("latency", "--model", "llama2-7b"), ("load",)):
        error = CliRunner().invoke(app, [*command, "--out", str(there)]).exception
        assert isinstance(error, OutputExists)


def test_prompts_are_lines_of_text_or_of_json(tmp_path: Path) -> None:
    empty, wrong, binary = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl", tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text("\n\n")
    wrong.write_text('{"text": "x"}\n')
    for file in (empty, wrong, binary, tmp_path / "none.txt", tmp_path):
        arguments = ["speculative", "--model", "a", "--draft", "b", "--prompts", str(file)]
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, UsageError)
        assert "--prompts" in str(error)


def test_the_first_key_of_a_key_file_is_the_client_s(tmp_path: Path) -> None:
    from pat_serve.server.http.keys import first_key

    file = tmp_path / "keys.txt"
    file.write_text("# ours\nalice=s3cret=\nbob=other\n")
    assert first_key(file) == "s3cret="
    file.write_text("plain-key==\n")
    assert first_key(file) == "plain-key=="
