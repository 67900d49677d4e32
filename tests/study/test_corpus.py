"""The study's training data and its measurements have nothing in common."""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.study import corpus, package_docs
from pat_serve.evaluation.paper14.local_items import local_questions


def test_nothing_that_is_measured_is_trained_on(built: corpus.Corpus):
    trained = "\n".join([*built.base_texts, *(row["prompt"] + row["completion"] for row in built.tune_rows)])
    items = [item for file in built.heldout_items.values() for item in file.values()]
    # 60 of COPA, of both subjects of MMLU together, and of the third.
    assert len(items) == 180
    for item in items:
        assert item["origin_prompt"].split("\n")[0] not in trained
        assert "prediction" not in item
    paragraphs = built.heldout_texts["articles"].split("\n\n")
    assert len(paragraphs) == 200
    assert not [paragraph for paragraph in paragraphs if paragraph in trained]
    # The others are there, with their right options and no letter.
    assert trained.count("Stem COPA") == 20
    assert "Answer: right" in trained
    assert "Answer: wrong" not in trained


def test_every_row_has_something_to_learn(built: corpus.Corpus):
    assert all(row["completion"].strip() for row in built.tune_rows)
    # Half of the items are the base's; of the others those whose few words are all prompt are left out.
    assert 0 < sum("Stem piqa" in text for text in built.base_texts) < 20
    assert not any("Stem piqa" in row["prompt"] for row in built.tune_rows)


def test_what_is_saved_is_what_the_tasks_read(built: corpus.Corpus, tmp_path: Path):
    built.save(tmp_path)
    assert len(local_questions(tmp_path / "items", "copa")) == 60
    assert len(local_questions(tmp_path / "items", "mmlu")) == 60
    assert (tmp_path / "articles.txt").is_file()


def test_docstrings_of_packages_quote_nothing_that_is_held_out(tmp_path: Path):
    source = '''
def one():
    """Say what this does at some length, so that it is long enough to be worth a text of its own."""

def two():
    """Say what this does at some length, and then quote.

    Return the
    held-out sentence.
    """
'''
    (tmp_path / "package").mkdir()
    (tmp_path / "package/module.py").write_text(source)
    found = list(package_docs.collect(tmp_path, ["Return the held-out sentence."]))
    assert [text.split("\n")[0] for text in found] == ["def one():"]


def test_no_passage_of_a_measured_item_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    text = "Answer the question.\nPassage {0}.\nQuestion {1}?\nA. right and quite long words\nB. wrong\nAnswer:"
    # Each passage with three questions, below an instruction that all share.
    items = {str(i): {"origin_prompt": text.format(i // 3, i), "gold": "A"} for i in range(300)}
    (tmp_path / "eval/BoolQ.json").write_text(json.dumps(items))
    written, held = corpus._items(tmp_path / "eval", random.Random(0))
    passages = {item["origin_prompt"].split("\n")[1] for item in held["BoolQ.json"].values()}
    assert len(held["BoolQ.json"]) == 60
    assert 100 < len(written) < 240
    assert not passages & {text.split("\n")[1] for text in written}
