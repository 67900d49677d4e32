"""Byte-order marks before what a user has written, and consoles that know few signs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pat_serve.cli.bench.speculative import _prompts
from pat_serve.errors import DataError, UsageError
from pat_serve.evaluation.text import text_from_file, wikitext2_from_file
from pat_serve.server.bench.planning.result import PlanSettings
from pat_serve.server.bench.planning.run import read_mix
from pat_serve.server.http.keys import collect_keys, first_key
from pat_serve.tokens.prompts import asked

ROWS = '{"text": "eins ü"}\n{"text": "zwei"}\n'


def test_a_mark_is_no_part_of_the_text(tmp_path: Path):
    for name, read in (("a.txt", text_from_file), ("a.jsonl", text_from_file), ("a.raw", wikitext2_from_file)):
        plain, marked = tmp_path / name, tmp_path / f"marked-{name}"
        plain.write_text(ROWS, encoding="utf-8")
        marked.write_text(ROWS, encoding="utf-8-sig")
        assert read(marked) == read(plain)
        assert "\ufeff" not in read(marked)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path):
    path = tmp_path / "a.txt"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + ROWS).encode(encoding))
    name = encoding.removesuffix("-be").upper()
    with pytest.raises(DataError, match=rf"in UTF-8, found a file in {name}, by its byte-order mark.*iconv"):
        text_from_file(path)
    with pytest.raises(UsageError, match=rf"in UTF-8, a key a line, found a file in {name}"):
        collect_keys([], environment={}, file=path)


def test_keys_and_prompts_behind_a_mark(tmp_path: Path):
    keys, prompts = tmp_path / "keys", tmp_path / "prompts.jsonl"
    keys.write_text("alice=secret-1\nsecret-2\n", encoding="utf-8-sig")
    ring = collect_keys([], environment={}, file=keys)
    assert ring.owner(b"Bearer secret-1") == "alice"
    assert first_key(keys) == "secret-1"
    prompts.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert _prompts(prompts) == asked(["a"])


def test_a_prompt_ends_with_its_line(tmp_path: Path):
    """Unicode's line separators are signs of the text, and files are joined with their marks."""
    rows = [f'{{"prompt": "{text}"}}\n' for text in ("a\u2028b", "c\x85d")]
    (tmp_path / "prompts.JSONL").write_text("\ufeff".join(["", *rows]), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a\u2028b\r\n\ufeffc\x0cd\n", encoding="utf-8")
    assert _prompts(tmp_path / "prompts.JSONL") == asked(["a\u2028b", "c\x85d"])
    assert _prompts(tmp_path / "prompts.txt") == asked(["a\u2028b", "c\x0cd"])
    (tmp_path / "lengths.jsonl").write_text('\ufeff{"prompt_tokens": 2, "output_tokens": 3}\n' * 2, encoding="utf-8")
    mix = read_mix(PlanSettings.model_construct(lengths=str(tmp_path / "lengths.jsonl")))
    assert (mix.prompt_tokens, mix.output_tokens) == ((2,), (3,))


def run(script: str, *arguments: str, encoding: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_signs_that_a_console_lacks(encoding: str):
    script = (
        "from pat_serve.cli.app import run_command\n"
        "def show(): print('1.0 \\u00b1 0.5 \\u2192 \\u00e9 \\U0001f600 \\udcff')\n"
        "run_command(show)"
    )
    done = run(script, encoding=encoding)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    plain = "1.0 +/- 0.5 -> \\u00e9 \\ud83d\\ude00 \\udcff"
    kept = [sign for sign in "±→é😀" if _has(encoding, sign)]
    for sign, written in (("±", "+/-"), ("→", "->"), ("é", "\\u00e9"), ("😀", "\\ud83d\\ude00")):
        plain = plain.replace(written, sign) if sign in kept else plain
    assert shown == f"{plain}\n"


def test_an_evaluation_on_such_a_console(tiny_base: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("a list of words " * 200)
    script = "from pat_serve.cli.eval import main; main()"
    done = run(script, str(tiny_base), "--text", str(text), "--context-tokens", "64", encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert b"+/-" in done.stdout


def _has(encoding: str, sign: str) -> bool:
    try:
        sign.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
