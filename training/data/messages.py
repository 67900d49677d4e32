"""Messages in the form in which vLLM hands them to a chat template, so that training and serving show it the same."""

from __future__ import annotations

import json
from typing import Any

from pat_serve.errors import DataError
from pat_serve.training.data.row import without_nulls


def normal_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with a text each; nulls are gone, tool calls have objects for arguments.

    Args:
        value: a list as OpenAI's API has it, or that as JSON.
        where: the row's place.

    Raises:
        DataError: another shape, or content that is no text.
    """
    value = from_json(value, "messages", where)
    if not isinstance(value, list):
        raise _bad_shape(where, f"{type(value).__name__} in the place of a list")
    return [_message(entry, number, where) for number, entry in enumerate(value, start=1)]


def _message(entry: Any, number: int, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise _bad_shape(where, f"message {number} is a {type(entry).__name__}")
    # Tables give every message the fields of all others, without a value.
    message: dict[str, Any] = without_nulls(entry)
    if not isinstance(message.get("role"), str):
        raise _bad_shape(where, f"message {number} has the fields {', '.join(sorted(message)) or '(none)'}")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    content = message.get("content")
    if content is None:
        if not ("tool_calls" in message or "function_call" in message):
            raise _bad_shape(where, f"message {number} ({message['role']}) has no content and no tool_calls")
        content = ""
    message["content"] = _text_of(content, number, where)
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, number, where) for call in _listed(message["tool_calls"])]
    # vLLM gives a template both names.
    reasoning = message.get("reasoning", message.get("reasoning_content"))
    return message | ({"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {})


def _text_of(content: Any, number: int, where: str) -> str:
    """A text, or the texts of a list of parts, joined as vLLM joins them."""
    if isinstance(content, str):
        return content
    texts = []
    for part in _listed(content):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "a part without a type") if isinstance(part, dict) else type(part).__name__
            raise _bad_shape(where, f"message {number} has content of another kind than text: {kind}")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: Any, number: int, where: str) -> dict[str, Any]:
    """A call whose arguments are an object: OpenAI's API writes them as JSON in a string, templates want the object."""
    if not isinstance(call, dict):
        raise _bad_shape(where, f"a tool call of message {number} is a {type(call).__name__}")
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return call | {"function": function | {"arguments": from_json(function["arguments"], "arguments", where)}}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _bad_shape(where: str, found: str) -> DataError:
    return DataError(
        where,
        expected="messages: a list of objects with a role and a content, which is a text or a list of text parts",
        found=found,
        fix="Mend the row, or leave it out.",
    )


def from_json(value: Any, name: str, where: str) -> Any:
    """A value that tables without nested columns hold as JSON in a text.

    Raises:
        DataError: the text is no JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(where, expected=f"{name} as JSON", found=str(error), fix="Mend the row.") from error
