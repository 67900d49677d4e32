from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import DataError
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.training.data import ALPACA, ALPACA_INPUT, encode_row, load_rows, parse_row
from tests.tiny_models import tiny_tokenizer


def test_forms_of_a_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "
    parsed = [
        parse_row({"prompt": "p", "completion": "c"}, "", tokenizer),
        parse_row({"instruction": "i", "input": "", "output": "o"}, "", tokenizer),
        parse_row({"instruction": "i", "input": "x", "output": "o"}, "", tokenizer),
        parse_row({"instruction": "i", "response": "r"}, "", tokenizer),
        parse_row({"instruction": "i", "context": "x", "response": "r", "category": "qa"}, "", tokenizer),
        parse_row(
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "", tokenizer
        ),
    ]
    assert [(row.prompt, row.completion) for row in parsed] == [
        ("p", "c"),
        (ALPACA.format(instruction="i"), "o"),
        (ALPACA_INPUT.format(instruction="i", input="x"), "o"),
        (ALPACA.format(instruction="i"), "r"),
        (ALPACA_INPUT.format(instruction="i", input="x"), "r"),
        ("[user] q [assistant] ", "a"),
    ]


NULLS = [None, "", float("nan"), []]


@pytest.mark.parametrize("null", NULLS)
def test_the_values_tell_the_form_and_not_the_columns(null: Any):
    """Tables, and sets put together of several, have every column in every row."""
    columns = ["messages", "prompt", "completion", "instruction", "input", "context", "output", "response", "tools"]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in (
        {"prompt": "p", "completion": "c"},
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "response": "r"},
        {"instruction": "i", "input": "x", "output": "o"},
        {"messages": messages},
    ):
        assert parse_row(dict.fromkeys(columns, null) | row, "", tokenizer) == parse_row(row, "", tokenizer)


def test_a_row_without_values_says_which_columns_have_none():
    with pytest.raises(DataError, match="found the fields id, and without a value completion, prompt"):
        parse_row({"prompt": None, "completion": None, "id": 1}, "row 1", tiny_tokenizer())
    with pytest.raises(DataError, match="'completion', found None"):
        parse_row({"prompt": "p", "completion": None}, "row 1", tiny_tokenizer())
    with pytest.raises(DataError, match="'response', found ''"):
        parse_row({"instruction": "i", "response": ""}, "row 1", tiny_tokenizer())


def test_a_whole_row_goes_before_half_a_one():
    """Some sets have a text made of the columns beside them."""
    row = parse_row({"prompt": "all of it", "instruction": "i", "input": "x", "output": "o"}, "", tiny_tokenizer())
    assert row.prompt == ALPACA_INPUT.format(instruction="i", input="x")
    row = parse_row({"prompt": "Sum x up", "completion": "c", "context": "x"}, "", tiny_tokenizer())
    assert row.prompt == "Sum x up"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("context", "about"), ("input", "about"), ("system", "Be brief."), ("history", [["q", "a"]]),
        ("tools", [{"name": "f"}]), ("tools", '[{"name": "f"}]'), ("functions", [{"name": "f"}]),
        ("images", ["a.png"]), ("documents", [{"text": "d"}]),
    ],
)  # fmt: skip
def test_content_that_a_form_cannot_take_is_refused(column: str, value: Any):
    row = {"prompt": "p", "completion": "c", column: value}
    with pytest.raises(DataError, match=f"row 1: expected a row without '{column}'"):
        parse_row(row, "row 1", tiny_tokenizer())


def test_an_instruction_has_one_text_to_be_about():
    row = {"instruction": "i", "input": "x", "context": "y", "output": "o"}
    with pytest.raises(DataError, match="'context'"):
        parse_row(row, "row 1", tiny_tokenizer())
    assert "x" in parse_row(row | {"context": "x"}, "row 1", tiny_tokenizer()).prompt


def test_columns_that_are_not_used_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "completion": "c", "id": 1, "tools": "[]", "note": None}
    path.write_text("".join(json.dumps(each) + "\n" for each in (row, row, row | {"source": "s"})))
    load_rows(str(path), "train", tiny_tokenizer())
    said = " ".join(capsys.readouterr().err.split())
    assert said.replace(str(path), "rows") == (
        "rows: columns that are not used: id, tools rows: columns that are not used: source"
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
STRIPPING = CHATML.replace("m.content", "m.content | trim")
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


@pytest.mark.parametrize(
    ("template", "content", "ending"),
    [
        pytest.param(CHATML, "a b", "a b<|im_end|>", id="ChatML"),
        pytest.param(LLAMA_2, "a b", "a b </s>", id="Llama 2"),
        pytest.param(STRIPPING, "a b\n", "a b<|im_end|>", id="content trimmed"),
        pytest.param(THINKING, "a b", "a b<|im_end|>", id="another opening than in the history"),
        pytest.param("{% for m in messages %}{{ m.content }}|{% endfor %}", "a b", "a b</s>", id="no token at the end"),
    ],
)
def test_a_chat_s_answer_ends_as_the_template_ends_a_turn(template: str, content: str, ending: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    row = parse_row(
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]}, "", tokenizer
    )
    example = encode_row(row, tokenizer, 200)
    assert example is not None
    labelled = [token for token in example["labels"] if token != IGNORED_LABEL]
    assert tokenizer.decode(labelled).lstrip() == ending
    assert labelled[-1] in tokenizer.added_tokens_decoder


def test_the_loss_covers_the_response_and_its_end_alone():
    tokenizer = tiny_tokenizer()
    row = parse_row({"prompt": "Join a and b:", "completion": " a b"}, "", tokenizer)
    example = encode_row(row, tokenizer, 64)
    assert example is not None
    labelled = [token for token in example["labels"] if token != IGNORED_LABEL]
    assert tokenizer.decode(labelled) == " a b</s>"
    assert tokenizer.decode(example["input_ids"]) == "Join a and b: a b</s>"
    assert len(example["labels"]) == len(example["input_ids"]) == len(example["attention_mask"])


def test_long_rows_are_cut_and_full_prompts_left_out():
    tokenizer = tiny_tokenizer()
    row = parse_row({"prompt": "abc", "completion": "d" * 500}, "", tokenizer)
    example = encode_row(row, tokenizer, 32)
    assert example is not None
    assert len(example["input_ids"]) == 32
    assert len(tokenizer.encode("abc")) == 3
    assert encode_row(row, tokenizer, 3) is None
    assert encode_row(parse_row({"prompt": "x " * 99, "completion": "d"}, "", tokenizer), tokenizer, 32) is None


def test_empty_lines_of_a_file_are_skipped(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n\n")
    assert len(load_rows(str(path), "train", tiny_tokenizer())) == 1
