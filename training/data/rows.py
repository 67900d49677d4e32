"""Rows of three forms become prompt and completion; an unusable one is an error with its place.

A row is `prompt`/`completion`, Alpaca's `instruction`/`input`/`output` (Dolly's `instruction`/`context`/`response`,
LaMini's `instruction`/`response`), or `messages` (ShareGPT's `conversations`) that end with the assistant's. The values
tell which one: tables give every row all columns, and fill in null.

Nothing that carries content is left out unsaid. A form takes the columns that it can use; a column of content that it
cannot use is refused; any other column is named once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pat_serve.errors import DataError
from pat_serve.training.data.chat import SYSTEM_COLUMNS, TEMPLATE_ARGUMENTS, parse_chat
from pat_serve.training.data.remarks import Remarks
from pat_serve.training.data.row import Row, Tokenizer

# Stanford Alpaca's prompt, which PAT trains with.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# In the public sets that have such columns, an answer is about their content; without it a row is another one.
_CONTENT = (
    "context", "input", "system", "system_prompt", "history", "tools", "functions", "documents", "image", "images",
    "audio", "audios", "video", "videos",
)  # fmt: skip
_CHATS = ("messages", "conversations", "conversation")
_CHAT_COLUMNS = {*TEMPLATE_ARGUMENTS, "chat_template_kwargs"}
_ANSWERS = ("response", "output")
_EMPTY_JSON = ("[]", "{}", "null")


def parse_row(row: Mapping[str, Any], where: str, tokenizer: Tokenizer, remarks: Remarks | None = None) -> Row:
    """Turn one row of any supported form into prompt and completion.

    Args:
        row: columns and their values.
        where: its place, for messages.
        tokenizer: for the chat template of `messages`.
        remarks: takes the names of columns that are not used.

    Raises:
        DataError: it has no response, an empty one, none of the supported forms, or content that its form cannot take.
    """
    filled = {name: value for name, value in row.items() if not _empty(value)}
    parsed, used = _parse(filled, row, where, tokenizer, remarks)
    _account_for(filled, used, parsed, where, remarks)
    try:
        (parsed.prompt + parsed.completion).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise DataError(
            where, expected="text that can be written in UTF-8", found=str(error), fix="Mend the row."
        ) from error
    return parsed


def _parse(
    filled: Mapping[str, Any], row: Mapping[str, Any], where: str, tokenizer: Tokenizer, remarks: Remarks | None
) -> tuple[Row, set[str]]:
    """The row, and the columns that are in it."""
    answer = next((name for name in _ANSWERS if name in filled), None)
    has_prompt = "prompt" in filled and "completion" in filled
    has_instruction = "instruction" in filled and answer is not None
    chat = next((name for name in _CHATS if name in filled), None)
    if chat is not None:
        parsed = parse_chat(filled, filled[chat], where, tokenizer, remarks)
        shown = {name for name in SYSTEM_COLUMNS if name in filled and _holds(parsed.prompt, filled[name])}
        return parsed, {chat, *shown, *_CHAT_COLUMNS}
    # A row that lacks its answer is told so by the form that it begins.
    if has_prompt or ("prompt" in filled and not has_instruction):
        if isinstance(filled["prompt"], list) and isinstance(filled.get("completion"), list):
            return _conversation(filled, where, tokenizer, remarks), {"prompt", "completion", *_CHAT_COLUMNS}
        parsed = Row(prompt=_text(row, "prompt", where), completion=_text(row, "completion", where))
        return parsed, {"prompt", "completion"}
    if "instruction" in filled:
        about = next((name for name in ("input", "context") if name in filled), "input")
        template = ALPACA_INPUT if about in filled else ALPACA
        answer = answer or next((name for name in _ANSWERS if name in row), "output")
        prompt = template.format(
            instruction=_text(row, "instruction", where), input=_text(row, about, where) if about in filled else ""
        )
        return Row(prompt=prompt, completion=_text(row, answer, where)), {"instruction", about, answer}
    raise DataError(
        where,
        expected="the fields prompt/completion, instruction/output, or messages (ShareGPT's conversations)",
        found=f"the fields {', '.join(sorted(filled)) or '(none)'}"
        + (f", and without a value {', '.join(sorted(set(row) - set(filled)))}" if len(row) > len(filled) else ""),
        fix="Rename the fields.",
    )


def _conversation(filled: Mapping[str, Any], where: str, tokenizer: Tokenizer, remarks: Remarks | None) -> Row:
    """A prompt and a completion that are messages each, as TRL has them."""
    if len(filled["completion"]) != 1:
        raise DataError(
            where,
            expected="one message in the completion",
            found=str(len(filled["completion"])),
            fix="Make a row of each answer.",
        )
    return parse_chat(filled, [*filled["prompt"], *filled["completion"]], where, tokenizer, remarks)


def _account_for(filled: Mapping[str, Any], used: set[str], parsed: Row, where: str, remarks: Remarks | None) -> None:
    """Refuse content that is not in the row, and name the other columns that are not."""
    text = parsed.prompt + parsed.completion
    unused = sorted(name for name in filled if name not in used)
    for name in unused:
        value = filled[name]
        if name not in _CONTENT or (isinstance(value, str) and value.strip() in _EMPTY_JSON):
            continue
        # Some sets have a row's parts beside the text that was made of them.
        if not _holds(text, value):
            raise DataError(
                where,
                expected=f"a row without {name!r}, which this form has no place for",
                found=f"{value!r:.60}",
                fix="Write it into the prompt or a message, or remove the column.",
            )
    if remarks is not None:
        remarks.name_once(unused, "columns that are not used")


def _holds(text: str, value: Any) -> bool:
    """A value is a text that stands in another one, not as a part of a word."""
    return isinstance(value, str) and bool(re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", text))


def _empty(value: Any) -> bool:
    """Null, or what a table has in the place of null: an empty text or list, not a number."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            where,
            expected=f"a text in the field {field!r}",
            found="no such field" if field not in row else f"{value!r}",
            fix="Add the text, or leave the row out.",
        )
    return value
