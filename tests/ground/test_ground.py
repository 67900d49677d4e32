"""The ground: what is measured stays out of the rows, and the same inputs give the same files."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from benchmarks.ground import debian
from benchmarks.ground.__main__ import ground
from benchmarks.ground.build import Ground, Inputs, build, write
from benchmarks.ground.mixture import mix
from benchmarks.ground.overlap import KeptOut, Seen, grams
from benchmarks.ground.own_answers import prompts_of
from benchmarks.ground.passages import PASSAGE_CHARACTERS, Document, Passage, passages_of, row_of
from benchmarks.ground.record import write_record
from pat_serve.cli.app import run_command
from pat_serve.errors import DataError
from pat_serve.evaluation.paper14.local_items import local_questions
from tests.ground.packages import dictionary_files, write_deb

WORDS = [f"{first}{second}" for first in ("al", "be", "co", "du", "en", "fo", "ga") for second in ("ra", "ti", "mo")]


def prose(seed: int, words: int = 60) -> str:
    """Sentences that share no 13 words with those of another seed."""
    return " ".join(f"{word}{seed}" for word in random.Random(seed).choices(WORDS, k=words)) + "."


def write_items(path: Path, name: str, count: int) -> None:
    items = {
        str(number): {
            # Three questions about each passage, after the wording that all items share.
            "origin_prompt": f"Read the passage and answer the question that follows it as well as you can now.\n"
            f"{prose(1000 + number // 3, 20)}\nQuestion {number}?\nA. yes{number}\nB. no{number}\nAnswer:",
            "prediction": "A",
            "gold": "B",
        }
        for number in range(count)
    }
    path.mkdir(exist_ok=True)
    (path / name).write_text(json.dumps(items))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    valid = "".join(f" = Article {number} = \n\n {prose(number)} \n {prose(100 + number)} \n" for number in range(40))
    # The third article's first paragraph is part of the test file.
    (folder / "valid.txt").write_text(valid)
    (folder / "test.txt").write_text(f" = Test = \n {prose(500)} {prose(2)} \n")
    write_items(folder / "items", "BoolQ.json", 60)
    entries = {f"word{number}": f"word{number}\n   n 1: {prose(200 + number)}\n" for number in range(200)}
    write_deb(folder / "debs/dict-wn_3.0-1_all.deb", dictionary_files("wn", entries))
    page = "<html><head><title>No</title></head><body><p>{}</p><ul><li>short</li></ul><pre>code.</pre></body></html>"
    pages = {f"usr/share/doc/git-doc/{n}.html": page.format(prose(600 + n)).encode() for n in range(30)}
    license_text = b"Format: 1.0\nLicense: GPL-2\n"
    write_deb(folder / "debs/git-doc_1%3a2.0_all.deb", {**pages, "usr/share/doc/git-doc/copyright": license_text})
    (folder / "library").mkdir()
    (folder / "library/shapes.py").write_text(
        f'def area(radius):\n    """Return the area.\n\n    {prose(700)}\n    """\n'
    )
    return Inputs(
        wikitext2_valid=folder / "valid.txt",
        items=folder / "items",
        keep_out=(folder / "test.txt",),
        debs=folder / "debs",
        libraries=[folder / "library"],
        characters=1_000_000,
    )


@pytest.fixture(scope="module")
def built(inputs: Inputs) -> Ground:
    with pytest.MonkeyPatch.context() as patch:
        two = tuple(package for package in debian.PACKAGES if package.name in ("dict-wn", "git-doc"))
        patch.setattr(debian, "PACKAGES", two)
        return build(inputs)


def test_rows_share_nothing_with_what_is_kept_out(built: Ground):
    trained = "\n".join(passage.text for passage in built.trained)
    assert prose(3) in trained
    assert prose(2) not in trained
    assert built.kept["articles"].touching >= 1
    assert len(built.held_out) >= 2
    unseen = KeptOut(passage.text for passage in built.held_out)
    assert not [passage for passage in built.trained if unseen.touches(grams(passage.text))]
    measured = [item["origin_prompt"] for file in built.measured.values() for item in file.values()]
    assert 10 < len(measured) < 50
    for prompt in measured:
        assert prompt.split("\n")[1] not in trained


def test_items_are_trained_on_with_their_right_option_alone(built: Ground):
    written = [passage.text for passage in built.trained if passage.source == "items"]
    measured = sum(len(file) for file in built.measured.values())
    # The wording that all items share keeps none of them out. Of three about one passage two repeat it.
    assert built.kept["items"].touching == 0
    assert len(written) + built.kept["items"].repeating + measured == 60
    assert len(written) >= 12
    assert all("\nAnswer: no" in text and "yes" not in text for text in written)


def test_files_are_the_same_in_a_second_call_and_read_by_the_product(
    built: Ground, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(built, tmp_path / "first")
    write_record(built, tmp_path / "first", None)
    monkeypatch.setattr(debian, "PACKAGES", tuple(package.package for package in built.packages))
    again = build(inputs)
    write(again, tmp_path / "second")
    write_record(again, tmp_path / "second", None)
    for name in ("train.jsonl", "heldout.txt", "heldout.jsonl", "ground.json", "CONTENTS.md", "items/BoolQ.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert len(local_questions(tmp_path / "first/items", "boolq")) == len(built.measured["BoolQ.json"])
    rows = [json.loads(line) for line in (tmp_path / "first/train.jsonl").read_text().splitlines()]
    assert len(rows) == len(built.trained)
    assert {row["prompt"] + row["completion"] for row in rows} == {passage.text for passage in built.trained}
    assert "| git-doc | 1:2.0 | GPL-2 |" in (tmp_path / "first/CONTENTS.md").read_text()
    assert (tmp_path / "first/licences/git-doc.copyright").read_text().startswith("Format")


def test_prompts_quote_only_what_is_trained_on(built: Ground):
    prompts, held = prompts_of(built)
    assert len(prompts) > 30
    assert held
    assert not set(prompts) & set(held)
    unseen = KeptOut(passage.text for passage in built.held_out)
    assert not [prompt for prompt in [*prompts, *held] if unseen.touches(grams(prompt))]
    assert prompts_of(built) == (prompts, held)


def test_every_beginning_has_the_sources_in_their_shares():
    passages = [Passage(source=source, document="", text=f"{source} {number:04} {'x' * size}")
                for source, size in (("a", 90), ("b", 190)) for number in range(500)]  # fmt: skip
    ordered = mix(passages, {"a": 0.25, "b": 0.75}, "seed")
    assert ordered == mix(passages[::-1], {"a": 0.25, "b": 0.75}, "seed")
    for end in (50, 200, 500):
        own = sum(len(passage.text) for passage in ordered[:end] if passage.source == "a")
        assert own / sum(len(passage.text) for passage in ordered[:end]) == pytest.approx(0.25, abs=0.02)


def test_a_gram_is_thirteen_words_without_case_and_punctuation():
    text = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen."
    assert len(grams(text)) == 2
    assert grams(text)[0] == grams("one, TWO three four five six seven eight nine ten eleven twelve thirteen!")[0]
    kept_out = KeptOut([text])
    assert kept_out.touches(grams(f"Before it. {text.upper()} After it."))
    assert not kept_out.touches(grams(text.replace("seven", "six")))
    assert KeptOut([text] * 10).touches(grams(text))
    assert not KeptOut([text] * 11).touches(grams(text))
    assert grams("...") == []


def test_a_passage_that_mostly_repeats_others_counts_once():
    seen = Seen()
    long = prose(1, 200)
    assert not seen.repeats(grams(long))
    assert seen.repeats(grams(long))
    assert seen.repeats(grams(f"{long} {prose(2, 40)}"))
    assert not seen.repeats(grams(f"{prose(3, 200)} {prose(1, 40)}"))


def test_passages_hold_whole_sentences_of_a_document():
    sentence = "Every sentence of this paragraph is about as long as the one that was before it. "
    document = Document(source="books", name="a", paragraphs=(sentence * 50, "Short.", sentence * 5))
    passages = list(passages_of(document))
    assert all(len(passage.text) <= PASSAGE_CHARACTERS for passage in passages)
    assert sum(passage.text.count("Every sentence") for passage in passages) == 55
    row = row_of("One two three four five six seven\neight.\n")
    assert row == {"prompt": "One two three four five six", "completion": " seven\neight.\n"}
    # A row whose prompt were blank is one that pat-train refuses.
    indented = row_of("      Why not?\n   One  two three four five six.")
    assert indented == {"prompt": "      Why not?\n   One  two three four", "completion": " five six."}
    assert row_of("One two three four five six \n") == {"prompt": "One two three four five", "completion": " six \n"}
    assert row_of("\n\n abc")["prompt"].strip()
    # Such a text ended in a search without end.
    long = row_of("x" * 2000)
    assert long["prompt"] + long["completion"] == "x" * 2000
    assert row_of("One\ntwo") == {"prompt": "One", "completion": "\ntwo"}


def test_a_file_that_is_no_package_is_told(tmp_path: Path):
    package = debian.PACKAGES[0]
    (tmp_path / f"{package.name}_1_all.deb").write_bytes(b"<html>not found</html>" * 20)
    path = debian.fetch(package, tmp_path)
    assert path is not None
    with pytest.raises(DataError, match="expected a Debian package"):
        debian.unpack(package, path)
    write_deb(path, {"usr/share/doc/other/readme": b"x"})
    with pytest.raises(DataError, match=r"expected files .*dictd"):
        debian.unpack(package, path)


def test_a_wrong_path_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["ground", "--out", str(out), "--wikitext2-valid", "nowhere.txt", "--no-packages"])
    with pytest.raises(SystemExit) as end:
        run_command(ground)
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert "nowhere.txt: expected a text file in UTF-8" in told
    assert "Traceback" not in told
    assert not out.exists()
