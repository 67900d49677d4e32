"""Prompts to answer, and the ids that a model gets of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pat_serve.errors import BrokenCheckpoint, DataError, first_line
from pat_serve.files.text_files import read_utf8
from pat_serve.tokens.habits import text_ids, token_habit

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to answer.

    Attributes:
        name: in the report.
        chats: each a conversation that ends with the user's turn.
    """

    name: str
    chats: tuple[Messages, ...]


def asked(texts: Sequence[str]) -> tuple[Messages, ...]:
    """A conversation of one turn for each text."""
    return tuple(({"role": "user", "content": text},) for text in texts)


def prompts_from_file(path: Path) -> Prompts:
    """Read a JSONL file of rows with a `prompt`, or with `messages` of which the assistant's last turn is left out.

    Raises:
        DataError: the file cannot be read, has no row, or a row is neither.
    """
    try:
        lines = read_utf8(path).split("\n")
    except (OSError, ValueError) as error:
        raise DataError(
            path, expected="a JSONL file in UTF-8", found=first_line(error), fix="Check --prompts."
        ) from error
    chats = [_chat(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not chats:
        raise DataError(path, expected="rows with a prompt", found="none", fix="Give a file with rows.")
    return Prompts(name=path.name, chats=tuple(chats))


def prompt_ids(tokenizer: Any, chat: Messages) -> list[int]:
    """Ids of a prompt: by the model's chat template where it has one, else the turns' text alone.

    Raises:
        BrokenCheckpoint: the template refuses the conversation.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template(
                [dict(turn) for turn in chat], tokenize=False, add_generation_prompt=True
            )
        # A template may raise anything.
        except Exception as error:
            raise BrokenCheckpoint(
                f"the chat template of {getattr(tokenizer, 'name_or_path', 'the model')}",
                expected="one that takes the conversations of --prompts",
                found=first_line(error),
                fix="Give prompts that it takes, or mend the template.",
            ) from error
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    return text_ids(tokenizer, "\n".join(turn["content"] for turn in chat), token_habit(tokenizer))


def _chat(line: str, where: str) -> Messages:
    try:
        row = json.loads(line.removeprefix("\ufeff"))
        if isinstance(row.get("prompt"), str):
            return asked([row["prompt"]])[0]
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in row["messages"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            where, expected='an object with a "prompt" or "messages"', found=f"{line:.60}", fix="Mend the line."
        ) from error
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise DataError(where, expected="a turn to answer", found="none", fix="Mend the line.")
    return tuple(turns)
