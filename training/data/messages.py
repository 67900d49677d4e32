"""Messages in the form in which vLLM hands them to a chat template, so that training and serving show it the same."""

from __future__ import annotations

import json
from typing import Any

from pat_serve.errors import DataError
from pat_serve.training.data.row import Tokenizer, without_nulls

# ShareGPT's names of who speaks, and the roles that templates know.
_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip


def normal_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with a text each; nulls are gone, tool calls have objects for arguments.

    Args:
        value: a list as OpenAI's API has it, or as ShareGPT has it (`from`, `value`), or one of them as JSON.
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
    if "role" not in message and "from" in message:
        message = _said(message, number, where)
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


def _said(message: dict[str, Any], number: int, where: str) -> dict[str, Any]:
    """A message of ShareGPT's as one of OpenAI's."""
    speaker = message["from"]
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise _bad_shape(where, f"message {number} is from {speaker!r:.40}, not from {', '.join(_SPEAKERS)}")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": role, "content": message.get("value")} | rest


def with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """Messages that begin with the text of a column beside them, unless they begin with a system message."""
    if not isinstance(system, str) or not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def for_template(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Messages as vLLM gives them to a template that knows no developer: that is the system's other name."""
    names_developer = any(f"{quote}developer{quote}" in template for quote in "'\"")
    if names_developer or not any(message["role"] == "developer" for message in messages):
        return messages
    leading = [message for message in messages if message["role"] in ("developer", "system")]
    system = "\n\n".join(message["content"] for message in leading if message["content"])
    return [{"role": "system", "content": system}, *(message for message in messages if message not in leading)]


def without_typed_ends(messages: list[dict[str, Any]], whole: str, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Messages without the tokens that somebody typed after them and the template writes itself.

    Args:
        messages: as the row has them.
        whole: their rendering.
        tokenizer: its end token is taken off an answer whatever ends the template's turns.
    """
    ends = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    shown = squeezed(whole)
    cleaned = []
    for message in messages:
        content = message["content"].rstrip()
        end = max((token for token in ends if content.endswith(token)), key=len, default=None)
        if end is not None:
            answers_end = message["role"] == "assistant" and end == tokenizer.eos_token
            if answers_end or squeezed(content + end) in shown:
                message = message | {"content": content.removesuffix(end)}
        cleaned.append(message)
    return cleaned


def squeezed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


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
        expected="messages: a list of objects with a role and a content, which is a text or a list of text parts (or "
        "with ShareGPT's from and value)",
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
