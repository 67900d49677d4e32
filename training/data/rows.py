"""Rows of three forms become prompt and completion; an unusable one is an error with its place.

A row is `prompt`/`completion`, Alpaca's `instruction`/`input`/`output` (or LaMini's `instruction`/`response`), or
`messages` that end with the assistant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pat_serve.errors import DataError, first_line

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

    @property
    def added_tokens_decoder(self) -> Any: ...  # noqa: D102

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as text.

    Attributes:
        prompt: what is asked.
        completion: the response.
        chat: the prompt carries its own special tokens.
        ended: the completion carries the end of its turn, so no end of text follows.
    """

    prompt: str
    completion: str
    chat: bool = False
    ended: bool = False


def parse_row(row: dict[str, Any], where: str, tokenizer: Tokenizer) -> Row:
    """Turn one row of any supported form into prompt and completion.

    Raises:
        DataError: it has no response, an empty one, or none of the supported forms.
    """
    parsed = _parse(row, where, tokenizer)
    try:
        (parsed.prompt + parsed.completion).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise DataError(
            where, expected="text that can be written in UTF-8", found=str(error), fix="Mend the row."
        ) from error
    return parsed


def _parse(row: dict[str, Any], where: str, tokenizer: Tokenizer) -> Row:
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
    content = _text(messages[-1], "content", where)
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    # A template is a program of the model's author and may raise what it likes.
    except Exception as error:
        raise DataError(
            where,
            expected="messages that the model's chat template takes",
            found=first_line(error),
            fix="Change the row's roles, or leave it out.",
        ) from error
    turn = _ended_turn(whole.removeprefix(prompt), content, tokenizer) if whole.startswith(prompt) else None
    return Row(prompt=prompt, completion=turn or content, chat=True, ended=turn is not None)


def _ended_turn(turn: str, content: str, tokenizer: Tokenizer) -> str | None:
    """The assistant's turn up to the token that a template ends it with: <|im_end|>, <|eot_id|>, </s>.

    Args:
        turn: what the template makes of it, without its opening.
        content: the text in it.
        tokenizer: knows which texts are tokens of their own.

    Returns:
        None of a template that ends a turn with no such token, or changes the content: the end of text is as good then.
        What separates the turn from a next one, a line feed mostly, is not the model's to say.
    """
    before, found, rest = turn.partition(content)
    if not found or before.strip():
        return None
    ends = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    end = max((token for token in ends if rest.lstrip().startswith(token)), key=len, default=None)
    space = rest[: len(rest) - len(rest.lstrip())]
    return None if end is None else before + content + space + end


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
