"""A run on chats: the day that its template wrote stays, and what its answers end with is where a server stops."""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from pat_serve.errors import BrokenPlan
from pat_serve.export.exporter import export_run
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data import encode_rows, load_rows
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.test_data import CHATML
from tests.test_resume import interrupt
from tests.tiny_models import save_tiny_llama

TODAY = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base that was never a chat's: its texts end with </s>, and its template's turns do not."""
    folder = save_tiny_llama(tmp_path / "base", vocab_size=386)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TODAY + CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        {"conversations": [{"from": "human", "value": f"q {number}"}, {"from": "gpt", "value": f"a {number}"}]}
        for number in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def short_recipe(base: Path, data: Path, **settings: Any) -> TrainRecipe:
    return tiny_recipe(base, data, **({"max_steps": 12} | settings))


def live_on(day: date, patch: pytest.MonkeyPatch) -> None:
    """Have the training and transformers' templates believe that it is another day."""

    class Day(date):
        @classmethod
        def today(cls) -> date:
            return day

    class Moment(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(day.year, day.month, day.day)

    patch.setattr("pat_serve.training.run.date", Day)
    patch.setattr("pat_serve.training.checks.inputs.date", Day)
    patch.setattr("transformers.utils.chat_template_utils.datetime", Moment)


def test_a_run_is_resumed_on_another_day(base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    live_on(date(2026, 2, 28), monkeypatch)
    interrupt(run, short_recipe(base, chats), 3)
    assert json.loads((run / "inputs.json").read_text())["day"] == "2026-02-28"
    live_on(date(2026, 3, 1), monkeypatch)
    resume(run)
    prompts = [json.loads(line)["token_ids"] for line in (run / "parity_prompts.jsonl").read_text().splitlines()]
    assert AutoTokenizer.from_pretrained(run).decode(prompts[0]).startswith("28 Feb 2026\n<|im_start|>")


def test_a_template_without_a_day_has_none(base: Path, chats: Path, tmp_path: Path):
    (base / "chat_template.jinja").write_text(CHATML)
    run = tmp_path / "run"
    interrupt(run, short_recipe(base, chats), 1)
    assert json.loads((run / "inputs.json").read_text())["day"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_an_export_stops_where_its_training_s_answers_end(
    streaming: bool, base: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, out = tmp_path / "run", tmp_path / "out"
    start(short_recipe(base, chats, streaming=streaming), run)
    export_run(run, out, parity=False)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 385]
    assert "end with [385], which the base's does not stop at" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("known", "ends"),
    [
        ({"eos_token_id": [1, 385], "temperature": 0.5}, [1, 385]),
        ({"eos_token_id": 385}, 385),
        ({}, [385]),
        (None, [1, 385]),  # then the config's count
    ],
)
def test_what_the_base_stops_at_stays(known: Any, ends: Any, base: Path, chats: Path, tmp_path: Path):
    run, out, path = tmp_path / "run", tmp_path / "out", base / "generation_config.json"
    path.unlink() if known is None else path.write_text(json.dumps(known))
    start(short_recipe(base, chats), run)
    export_run(run, out, parity=False)
    found = json.loads((out / "generation_config.json").read_text())
    assert found["eos_token_id"] == ends
    assert found.get("temperature") == (known or {}).get("temperature")
    # A run of an earlier version says nothing of ends.
    (run / "end_tokens.json").unlink()
    export_run(run, out, parity=False, force=True)
    if known is not None:
        assert json.loads((out / "generation_config.json").read_text()) == known
    for damage in ("{", '{"token_ids": [386]}', '{"token_ids": null}'):
        (run / "end_tokens.json").write_text(damage)
        with pytest.raises(BrokenPlan, match="end_tokens"):
            export_run(run, tmp_path / "none", parity=False)


def test_plain_answers_end_with_the_tokenizers_end(base: Path, rows: Path, chats: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for data, expected in ((rows, {1}), (chats, {385})):
        ends: set[int] = set()
        encode_rows(load_rows(str(data), "train", tokenizer), tokenizer, 256, ends)
        assert ends == expected
