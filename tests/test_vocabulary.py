"""Tokens without a row in the embedding, as after adding tokens to a tokenizer without resizing the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.errors import DataError
from pat_serve.evaluation.backends import BackendSettings
from pat_serve.evaluation.subject import Subject
from pat_serve.export.exporter import export_run
from pat_serve.tokens.vocabulary import Vocabulary, vocabulary_of
from pat_serve.tokens.vocabulary_guard import drop_rowless
from pat_serve.training.api import PatConfig, apply_pat
from pat_serve.training.data import load_tokenizer
from pat_serve.training.run import start
from tests.conftest import tiny_recipe, write_rows

NAMED = r"<\|im_start\|> \(384\), <\|im_end\|> \(385\)"


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("rowless") / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The second half of them ends as a chat does."""
    path = write_rows(tmp_path / "rows.jsonl")
    lines = path.read_text().splitlines()
    row = {"prompt": "<|im_start|>Join a and b", "completion": "a b<|im_end|>"}
    path.write_text("\n".join([*lines[:32], *[json.dumps(row)] * 32]) + "\n")
    return path


def test_a_tokenizer_beside_an_embedding(base: Path):
    vocabulary = vocabulary_of(base, 384)
    assert vocabulary == Vocabulary(rows=384, rowless={384: "<|im_start|>", 385: "<|im_end|>"})
    assert vocabulary.beyond([0, 383, 384, -1, 384]) == [-1, 384]
    # More rows than tokens is how Qwen's and others are made.
    assert vocabulary_of(base, 400) == Vocabulary(rows=400, rowless={})
    assert Vocabulary(rows=400, rowless={}).warning is None
    assert vocabulary_of(base.parent, 384) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_training_on_them_does_not_begin(streaming: bool, base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(DataError, match=rf"--data: expected token ids below 384.*found {NAMED}.*resize_token"):
        start(tiny_recipe(base, rows, streaming=streaming), run)
    assert not run.exists()


def test_held_out_rows_count_too(base: Path, rows: Path, tmp_path: Path):
    plain = write_rows(tmp_path / "plain.jsonl")
    with pytest.raises(DataError, match=rf"the held-out rows: .*{NAMED}"):
        start(tiny_recipe(base, plain, eval_data=str(rows)), tmp_path / "run")


def test_a_stream_that_comes_to_them_later_stops(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pat_serve.training.data.training_data.STREAM_HEAD", 4)
    path = write_rows(tmp_path / "rows.jsonl", 8)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "a", "completion": "b<|im_end|>"}) + "\n")
    with pytest.raises(DataError, match=r"--data: .*found <\|im_end\|> \(385\)"):
        start(tiny_recipe(base, path, streaming=True, calibration_rows=8, mask_start="energy"), tmp_path / "run")


def test_without_them_the_training_goes_on_and_every_step_warns(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, out = tmp_path / "run", tmp_path / "out"
    start(tiny_recipe(base, write_rows(tmp_path / "rows.jsonl")), run)
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: the tokenizer has 2 tokens without a row in the model's embedding of 384 rows" in told
    exported = export_run(run, out)
    assert any("<|im_start|> (384), <|im_end|> (385)" in warning for warning in exported.record["fits"]["warnings"])
    assert "2 tokens without a row" in " ".join(capsys.readouterr().err.split())


def test_examples_of_the_python_api(base: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(DataError, match=r"calibration: .*found token \(385\)"):
        apply_pat(model, PatConfig(base=str(base)), calibration=[{"input_ids": [1, 2, 385], "labels": [1, 2, 385]}])


@pytest.mark.parametrize("ids", [[1, 2, 385], [384, 385]])
def test_perplexity_of_them(ids: list[int], base: Path):
    subject = Subject("base", base, BackendSettings(), load_tokenizer)
    with pytest.raises(DataError, match=r"the tokenizer of base: .*<\|im_end\|> \(385\)"):
        subject.nll([{"input_ids": ids, "labels": ids}], 1)


def test_tasks_with_them(base: Path):
    """lm-eval makes the requests; what is refused is the lookup."""
    from lm_eval.api.instance import Instance

    lm = Subject("base", base, BackendSettings(), load_tokenizer).lm

    def ask(context: str) -> Any:
        request = Instance("loglikelihood", {}, (context, " b"), 0)
        return lm.loglikelihood([request], disable_tqdm=True)

    assert ask("a")
    with pytest.raises(DataError, match=r"a task's text.*<\|im_end\|> \(385\)"):
        ask("a<|im_end|>")


def test_stops_and_bad_words_without_a_row_are_dropped():
    params = SimpleNamespace(
        _all_stop_token_ids={1, 99_999}, stop_token_ids=[1, 99_999, -1], _bad_words_token_ids=[[5], [5, 385]]
    )
    drop_rowless(params, 384)
    assert params == SimpleNamespace(_all_stop_token_ids={1}, stop_token_ids=[1], _bad_words_token_ids=[[5]])
