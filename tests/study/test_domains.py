"""The study's other texts: nothing that is measured was trained on, in any language."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from benchmarks.study import domains
from benchmarks.study.corpus import Corpus
from pat_serve.errors import UsageError

GENERAL = Corpus(
    base_texts=["general"],
    tune_rows=[{"prompt": "p", "completion": "c"}],
    heldout_rows=[],
    heldout_texts={"python": "held"},
    heldout_items={"COPA.json": {}},
)
FUNCTION = '''
def {name}(one, two=2):
    """Say what it does."""
    total = one + two
    for number in range({number}):
        total += number * total
        if total > 1000 * {number}:
            return total
    return total - {number}


def short():
    return 1
'''


def test_code_is_tuned_on_bodies_and_whole_modules_are_held_out(tmp_path: Path) -> None:
    names = ["heapq", "json", "queue", "random", "shelve", "string", "uuid", "wave", "zipfile", "abc", "cmd", "copy"]
    for number, name in enumerate(names):
        (tmp_path / f"{name}.py").write_text(FUNCTION.format(name=f"of_{name}", number=number))
    found = domains.code(GENERAL, library=tmp_path)
    held = {name for name in names if domains.is_held_out(name)}
    assert 0 < len(held) < len(names), "the fixture has modules of both kinds"
    assert {row["prompt"] for row in found.tune_rows} == {
        f"def of_{name}(one, two=2):\n" for name in names if name not in held
    }
    assert len(found.heldout_rows) == len(held)
    trained = "".join(row["prompt"] + row["completion"] for row in found.tune_rows)
    for row in found.heldout_rows:
        assert row["completion"] not in trained
        assert row["completion"].startswith("    total = one + two\n    for number"), "without its docstring"
        assert row["completion"] in found.heldout_texts["code"]
    assert found.base_texts == GENERAL.base_texts
    assert found.heldout_texts["python"] == "held"
    assert not found.heldout_items


def write_catalogue(path: Path, messages: dict[str, str]) -> None:
    """A .mo file, as msgfmt writes it."""
    pairs = [
        ("", "Content-Type: text/plain; charset=UTF-8\n"),
        *((key, value) for key, value in sorted(messages.items())),
    ]
    texts = [text.encode() for key, value in pairs for text in (key, value)]
    at = 28 + 16 * len(pairs)
    places, body = [], b""
    for text in texts:
        places.append((len(text), at + len(body)))
        body += text + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    table = b"".join(struct.pack("<2I", *place) for place in [*places[::2], *places[1::2]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + table + body)


@pytest.fixture
def catalogues(tmp_path: Path) -> Path:
    for language in domains.LANGUAGES:
        for number in range(30):
            write_catalogue(
                tmp_path / language / "LC_MESSAGES" / f"program{number}.mo",
                {
                    f"program {number}: cannot open file {i}": f"{language} {number}: über die Datei {i} (äöü)"
                    for i in range(12)
                }
                | {"cannot be opened by any of the programs": f"{language}: the same in all of the programs"},
            )
        write_catalogue(tmp_path / language / "LC_MESSAGES" / "iso_3166.mo", {"A" * 40: "Land" * 10})
    return tmp_path


def test_programs_are_held_out_in_all_languages_alike(catalogues: Path) -> None:
    found = domains.languages(catalogues=catalogues, least_characters=1000)
    assert set(found.heldout_texts) == {"en", *domains.LANGUAGES}
    held = {number for number in range(30) if domains._is_held_out_program(f"program{number}")}
    assert 0 < len(held) < 30
    trained = [*found.base_texts, *(line for row in found.tune_rows for line in row["completion"].split("\n"))]
    # Each language: of every program that is not held out 12 messages, and the one that all share.
    assert len(trained) == (1 + len(domains.LANGUAGES)) * ((30 - len(held)) * 12 + 1)
    assert abs(2 * len(found.base_texts) - len(trained)) <= len(found.heldout_texts)
    assert not any("Land" in text for text in trained)
    for language, text in found.heldout_texts.items():
        for message in text.split("\n\n"):
            assert message not in trained
            program = int(message.split()[1].rstrip(":"))
            assert program in held
            assert message.startswith("program" if language == "en" else language)
    assert {row["prompt"] for row in found.heldout_rows} == {f"### {name}\n" for name in found.heldout_texts}


def test_a_machine_without_catalogues_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found 0"):
        domains.languages(catalogues=tmp_path)
