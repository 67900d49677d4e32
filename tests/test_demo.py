"""The demo's pure parts. The demo itself is run by `make demo`; its stages are the commands that other tests cover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pat_serve.demo.corpus import build_corpus, is_held_out
from pat_serve.demo.stages import Stage
from pat_serve.demo.tiny.base_model import BaseSettings, pack, train_base, train_tokenizer
from pat_serve.demo.tiny.pipeline import Pipeline
from pat_serve.errors import PatServeError

LIBRARY = {
    "json/decoder.py": 'def loads(text, *, strict=True):\n    """Return the object in text.\n\n    More."""\n',
    "random.py": 'class Random(Base):\n    """Random number generator base class. More."""\n',
    "broken.py": "def broken(:\n",
    "test/support.py": 'def helper():\n    """Help the tests run well."""\n',
    "odd.py": 'def odd():\n    """no capital letter here."""\n\ndef short():\n    """Short."""\n',
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in LIBRARY.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lib"


def test_rows_are_signatures_and_first_sentences(library: Path):
    corpus = build_corpus(library)
    assert corpus.train_rows == [
        {
            "prompt": "### Python\ndef loads(text, *, strict=True):\n### What it does\n",
            "completion": "Return the object in text.",
        }
    ]
    assert corpus.held_out_rows == [
        {
            "prompt": "### Python\nclass Random(Base):\n### What it does\n",
            "completion": "Random number generator base class.",
        }
    ]


def test_held_out_modules_are_in_no_training_text(library: Path):
    assert is_held_out("random")
    assert is_held_out("random.anything")
    assert not is_held_out("json.decoder")
    texts = "\n".join(build_corpus(library).base_texts)
    assert "Return the object in text." in texts
    assert "Random number generator" not in texts


def test_this_interpreters_library_gives_enough():
    corpus = build_corpus()
    assert len(corpus.train_rows) > 1000
    assert len(corpus.held_out_rows) > 100
    train = {row["prompt"] for row in corpus.train_rows}
    assert not train & {row["prompt"] for row in corpus.held_out_rows}


def test_packing_wastes_less_than_a_block():
    texts = [f"The number {number} is followed by {number + 1}." for number in range(40)]
    tokenizer = train_tokenizer(texts, 300)
    blocks = pack(texts, tokenizer, 16)
    assert all(len(block["input_ids"]) == 16 for block in blocks)
    joined = tokenizer.decode([token for block in blocks for token in block["input_ids"].tolist()])
    assert joined.startswith("<s>The number 0 is followed by 1.</s><s>The number 1")


def test_the_base_learns(tmp_path: Path):
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [f"The number {number} is followed by {number + 1}." for number in range(300)]
    settings = BaseSettings(
        vocab_size=300, hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=2,
        context_tokens=32, batch_size=8, steps=80,
    )  # fmt: skip
    train_base(texts, tmp_path / "base", settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = tokenizer("The number 12 is followed by 13.", return_tensors="pt")["input_ids"]
    # The model is served as it was trained: every text of `pack` begins with this token.
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() < 0.5 * math.log(300)


def test_a_second_run_goes_on_from_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []

    class Two(Pipeline):
        def stages(self) -> list[Stage]:
            def make(name: str) -> None:
                ran.append(name)
                if name == "second" and len(ran) < 3:
                    raise PatServeError(name, expected="a", found="b", fix="c")
                (self.out / name).write_text("")

            return [
                Stage(name=name, title=name, output=self.out / name, run=lambda name=name: make(name))
                for name in ("first", "second")
            ]

    with pytest.raises(PatServeError):
        Two(tmp_path).run()
    Two(tmp_path).run()
    assert ran == ["first", "second", "second"]
    assert set(json.loads((tmp_path / "timings.json").read_text())) == {"first", "second"}
