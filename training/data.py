"""Instruction data: rows of three forms become token ids whose loss covers the response alone.

A row is `prompt`/`completion`, Alpaca's `instruction`/`input`/`output` (or LaMini's `instruction`/`response`), or
`messages` that end with the assistant's. Every row is checked before training starts; an error names its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pat_serve.errors import DataError, MissingModel, UsageError, first_line
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.progress import track

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


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as text. `chat` prompts carry their own special tokens."""

    prompt: str
    completion: str
    chat: bool = False


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local model.

    Raises:
        MissingModel: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise MissingModel(
            folder,
            expected="a tokenizer beside the model",
            found=first_line(error),
            fix="Copy its tokenizer files too.",
        ) from error


class PadBatch:
    """Collates encoded rows into a padded batch.

    The padding id is any valid one: it is masked, and its label does not count. Llama-2's tokenizer names none.
    """

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Pad on the right to the longest row: input_ids, attention_mask and labels of shape (batch, longest)."""
        longest = max(len(example["input_ids"]) for example in examples)
        padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED_LABEL}
        return {
            name: torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])
            for name, value in padding.items()
        }


def load_rows(source: str, split: str, tokenizer: Tokenizer) -> list[Row]:
    """Read a JSONL file or a hub dataset.

    Args:
        source: path of a .jsonl file, or a hub id.
        split: of a hub dataset.
        tokenizer: for the chat template of `messages`.

    Raises:
        DataError: the source cannot be read, is empty, or a row of it is unusable (the message has its line).
    """
    rows = [parse_row(row, where, tokenizer) for where, row in _raw_rows(source, split)]
    if not rows:
        raise DataError(f"--data {source}", expected="at least one row", found="none", fix="Give a dataset with rows.")
    return rows


def parse_row(row: dict[str, Any], where: str, tokenizer: Tokenizer) -> Row:
    """Turn one row of any supported form into prompt and completion.

    Raises:
        DataError: it has no response, an empty one, or none of the supported forms.
    """
    if "messages" in row:
        return _parse_messages(row["messages"], where, tokenizer)
    if "prompt" in row:
        return Row(prompt=_text(row, "prompt", where), completion=_text(row, "completion", where))
    if "instruction" in row:
        instruction = _text(row, "instruction", where)
        context = row.get("input") or ""
        if not isinstance(context, str):
            raise DataError(
                where, expected="a text in the field 'input'", found=repr(context), fix="Write it as one text."
            )
        template = ALPACA_INPUT if context else ALPACA
        response = "response" if "response" in row else "output"
        return Row(
            prompt=template.format(instruction=instruction, input=context), completion=_text(row, response, where)
        )
    raise DataError(
        where,
        expected="the fields prompt/completion, instruction/output, or messages",
        found=f"the fields {', '.join(sorted(row)) or '(none)'}",
        fix="Rename the fields.",
    )


def encode_row(row: Row, tokenizer: Tokenizer, max_length_tokens: int) -> dict[str, list[int]] | None:
    """Token ids and labels of one example: <s> prompt completion </s>, labels on the completion and </s> alone.

    Returns:
        input_ids, attention_mask and labels of at most `max_length_tokens`; None when the prompt leaves no room for the
        response.
    """
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and not row.chat else []
    prompt = start + tokenizer.encode(row.prompt, add_special_tokens=False)
    completion = tokenizer.encode(row.completion, add_special_tokens=False)
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    if len(prompt) >= max_length_tokens:
        return None
    input_ids = (prompt + completion)[:max_length_tokens]
    labels = ([IGNORED_LABEL] * len(prompt) + completion)[:max_length_tokens]
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}


def encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length_tokens: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Encode all rows.

    Returns:
        the examples, and how many rows were left out because their prompt alone is too long.

    Raises:
        UsageError: no row fits.
    """
    encoded = [encode_row(row, tokenizer, max_length_tokens) for row in track(rows, "tokenize", len(rows))]
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise UsageError(
            "--max-length-tokens",
            expected="room for at least one row's prompt and response",
            found=f"{max_length_tokens} tokens, all filled by the prompts",
            fix="Raise it.",
        )
    return examples, len(encoded) - len(examples)


def _raw_rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    if path.is_file():
        yield from _jsonl_rows(path)
        return
    if path.is_dir() or path.suffix in (".json", ".jsonl") or source.startswith((".", "/", "~")):
        raise DataError(
            f"--data {source}",
            expected="a JSONL file or a hub id",
            found="a folder" if path.is_dir() else "no such file",
            fix="Check the path.",
        )
    yield from _hub_rows(source, split)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode())
            except ValueError as error:  # of the JSON, or of the UTF-8
                raise DataError(where, expected="a JSON object", found=str(error), fix="Mend the line.") from error
            if not isinstance(row, dict):
                raise DataError(where, expected="a JSON object", found=type(row).__name__, fix="Mend the line.")
            yield where, row


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, split=split)
    # The library raises a dozen unrelated types (HTTP, cache, parsing); all mean the same to the user.
    except Exception as error:
        raise DataError(
            f"--data {source}",
            expected="a JSONL file, or a hub dataset that can be downloaded or is cached",
            found=f"no such file, and the hub said {type(error).__name__}: {first_line(error)}",
            fix="Check the name, --data-split, the network and HF_TOKEN.",
        ) from error
    for number, row in enumerate(dataset):
        yield f"{source}[{split}], row {number}", dict(row)


def _parse_messages(messages: Any, where: str, tokenizer: Tokenizer) -> Row:
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message
        for message in messages
    )
    if not well_formed or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            where,
            expected="messages with role and content that end with the assistant's",
            found="another shape" if not well_formed else f"roles {[message['role'] for message in messages]}",
            fix="Add the response, or leave the row out.",
        )
    if not tokenizer.chat_template:
        raise DataError(
            where,
            expected="a tokenizer with a chat template, for messages",
            found="a tokenizer without one",
            fix="Use prompt/completion rows, or a chat model's tokenizer.",
        )
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    # A template is a program of the model's author and may raise what it likes.
    except Exception as error:
        raise DataError(
            where,
            expected="messages that the model's chat template takes",
            found=first_line(error),
            fix="Change the row's roles, or leave it out.",
        ) from error
    return Row(prompt=prompt, completion=_text(messages[-1], "content", where), chat=True)


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            where,
            expected=f"a text in the field {field!r}",
            found="no such field" if field not in row else f"{value!r}",
            fix="Add the text, or leave the row out.",
        )
    return value
