"""Text cut by the WikiText-2 protocol, and its perplexity against transformers' own loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.errors import DataError, UsageError
from pat_serve.evaluation.backends import BackendSettings, open_backend, token_nll
from pat_serve.evaluation.compare import perplexity_measure
from pat_serve.evaluation.measuring import measure_models
from pat_serve.evaluation.plan import Plan, Text
from pat_serve.evaluation.subject import Subject
from pat_serve.evaluation.text import cut_windows, text_from_file, wikitext2_from_file
from pat_serve.perplexity import IGNORED_LABEL, measure_nll
from pat_serve.training.data import load_tokenizer
from tests.tiny_models import SENTENCES

ARTICLES = [" ", *(f" {line.strip()} " for text in SENTENCES[:3] for line in text.splitlines())]


def test_wikitext_rows_are_joined_as_the_hubs_are(tmp_path: Path):
    """The hub's rows keep their line feed, and blank ones are empty."""
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = Title = \n \n Text of it . \n", encoding="utf-8")
    assert wikitext2_from_file(path) == "\n\n".join(["", " = Title = \n", "", " Text of it . \n"])


def test_text_of_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 1}\n')
    (tmp_path / "A.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"prompt": "two"}\n')
    assert text_from_file(tmp_path / "a.txt") == "one\n two"
    assert text_from_file(tmp_path / "a.jsonl") == text_from_file(tmp_path / "A.JSONL") == "one\n\ntwo"
    with pytest.raises(DataError, match=r"b.jsonl, line 2: .* For instructions use --data"):
        text_from_file(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="No such file"):
        text_from_file(tmp_path / "c.txt")


def scored(windows: list[dict[str, list[int]]]) -> list[int]:
    return [label for window in windows for label in window["labels"] if label != IGNORED_LABEL]


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    windows = cut_windows(list(range(11)), 4)
    assert [window["input_ids"] for window in windows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert scored(windows) == [1, 2, 3, 5, 6, 7]


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_with_a_stride_every_token_but_the_first_is_scored_once(length: int, context: int, data: st.DataObject):
    stride = data.draw(st.integers(1, context))
    windows = cut_windows(list(range(length)), context, stride)
    starts = set(range(stride, length, stride)) if stride == context else set()
    assert scored(windows) == [token for token in range(1, length) if token not in starts]
    assert all(len(window["input_ids"]) <= context for window in windows)


def test_a_stride_beyond_the_window_is_refused():
    with pytest.raises(ValueError, match="not 5"):
        cut_windows([1, 2], 4, 5)


def test_agrees_with_transformers_own_loss(tiny_base: Path, tmp_path: Path):
    """The protocol as the field's scripts write it down: one window a call, exp of the mean loss."""
    path = tmp_path / "wiki.txt"
    path.write_text("\n".join(ARTICLES), encoding="utf-8")
    text, context = wikitext2_from_file(path), 64
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    losses = []
    with torch.no_grad():
        for number in range(ids.numel() // context):
            window = ids[:, number * context : (number + 1) * context]
            losses.append(model(window, labels=window).loss.item())
    assert len(losses) > 5
    plan = Plan(
        texts=(Text(name="wikitext2", read=lambda: text, identity="x"),),
        context_tokens=context,
        load_tokenizer=load_tokenizer,
    )
    _, [measure] = measure_models([str(tiny_base)], plan)
    [result] = measure.results
    assert result.items == len(losses)
    assert result.tokens == len(losses) * (context - 1)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_lm_eval_scores_the_same_tokens(tiny_base: Path):
    """The way by which vLLM and servers are asked, through transformers."""
    pytest.importorskip("lm_eval")
    ids = torch.randint(384, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = cut_windows(ids, 48, 32)
    sums, counts = token_nll(open_backend("tiny", tiny_base, BackendSettings()), windows)
    sums_N, counts_N = measure_nll(tiny_base, windows, dtype=torch.float32)
    assert counts == counts_N.tolist()
    assert sums == pytest.approx(sums_N.tolist(), rel=1e-5)


def test_other_tokens_are_not_compared():
    from pat_serve.evaluation.outcomes import Likelihoods

    def one(sha256: str) -> Likelihoods:
        return Likelihoods(sums=[2.0, 3.0], counts=[2, 2], sha256=sha256, unit="window")

    measure = perplexity_measure("text", {"a": one("1"), "b": one("2"), "c": one("1")}, {})
    assert [result.versus_first is not None for result in measure.results] == [False, False, True]
    assert "different tokens" in measure.notes[0]


def test_vllm_has_room_for_its_generated_token(tiny_base: Path):
    """lm-eval cuts what vLLM cannot score, from the left and without a word; a window's perplexity would be wrong."""
    by_backend = {
        name: Subject("tiny", tiny_base, BackendSettings(backend=name), load_tokenizer) for name in ("hf", "vllm")
    }
    assert by_backend["hf"].positions == 256
    assert by_backend["vllm"].positions == 255
    example = {"input_ids": [5] * 256, "labels": [5] * 256}
    # Refused before lm-eval is given it; no engine is started.
    by_backend["vllm"].__dict__["lm"] = None
    with pytest.raises(UsageError, match="at most 255"):
        by_backend["vllm"].nll([example], 1)
