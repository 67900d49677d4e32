"""Fields of a JSON body that make the server run what its client wrote; each needs the operator's --allow."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pat_serve.server.http.errors import InvalidRequestError
from pat_serve.server.http.policy import Feature

_GRAMMARS = (
    "structured_outputs", "structural_tag", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_decoding_backend", "output_format",
)  # fmt: skip
# OpenAI's clients send a word here, Anthropic's an object.
_FREE_CHOICES = ("none", "auto")
_MEDIA_FIELDS = ("mm_processor_kwargs", "media_io_kwargs", "multi_modal_data", "mm_payload", "return_mm_kwargs")
# These fields name other engines, from which this one would fetch keys and values.
_TRANSFERS = ("kv_transfer_params", "ec_transfer_params")
_SAID = ("messages", "input", "system", "previous_input_messages")
# Fields in which a message, or a part of a message, holds further parts. Arguments of a tool are any JSON, and not
# among them.
_HOLDS_PARTS = ("content", "output", "outputs", "summary")
_TEXT_PARTS = frozenset(
    {
        "", "text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text", "thinking",
        "redacted_thinking", "tool_use", "tool_result", "tool_reference", "tool_addition", "tool_removal",
    }
)  # fmt: skip
_MEDIA = re.compile("image|audio|video|vision|file|media|screenshot", re.IGNORECASE)


def check_features(fields: Mapping[str, Any], allowed: Collection[Feature]) -> None:
    """Refuse a body that asks for a feature which the operator has not allowed.

    Raises:
        InvalidRequestError: the body asks for such a feature.
    """
    for name in _TRANSFERS:
        arguments = fields.get("vllm_xargs")
        if fields.get(name) is not None or (isinstance(arguments, dict) and name in arguments):
            raise InvalidRequestError(f"{name}: this server takes no work from other engines; leave it out", name)
    for feature, name in _asked(fields):
        if feature not in allowed:
            raise InvalidRequestError(f"{name}: not allowed here; the server's operator can --allow {feature}", name)
    for name in _SAID:
        for feature in _said(fields.get(name), part=name == "system"):
            if feature not in allowed:
                raise InvalidRequestError(f"{name}: only text; the server's operator can --allow {feature}", name)


def _asked(fields: Mapping[str, Any]) -> Iterator[tuple[Feature, str]]:
    for name in _GRAMMARS:
        if fields.get(name) is not None:
            yield Feature.STRUCTURED_OUTPUT, name
    for name, form in (("response_format", fields.get("response_format")), ("text", _inner(fields.get("text")))):
        if isinstance(form, dict) and form.get("type", "text") != "text":
            yield Feature.STRUCTURED_OUTPUT, name
    # Anthropic's field has no form for plain text.
    if _inner(fields.get("output_config")) is not None:
        yield Feature.STRUCTURED_OUTPUT, "output_config"
    choice = fields.get("tool_choice")
    if choice is not None and (choice.get("type") if isinstance(choice, dict) else choice) not in _FREE_CHOICES:
        yield Feature.STRUCTURED_OUTPUT, "tool_choice"
    if any(_is_strict(tool) for tool in _items(fields.get("tools"))):
        yield Feature.STRUCTURED_OUTPUT, "tools"
    template_arguments = fields.get("chat_template_kwargs")
    if fields.get("chat_template") is not None:
        yield Feature.CHAT_TEMPLATE, "chat_template"
    if isinstance(template_arguments, dict) and "chat_template" in template_arguments:
        yield Feature.CHAT_TEMPLATE, "chat_template_kwargs"
    for name in _MEDIA_FIELDS:
        if fields.get(name):
            yield Feature.MEDIA, name
    if fields.get("prompt_embeds") is not None:
        yield Feature.PROMPT_EMBEDS, "prompt_embeds"


def _inner(config: Any) -> Any:
    return config.get("format") if isinstance(config, dict) else None


def _is_strict(tool: Any) -> bool:
    # The schema of a strict tool becomes a grammar, whatever the choice of tools is.
    return isinstance(tool, dict) and any(
        isinstance(told, dict) and told.get("strict") for told in (tool, tool.get("function"))
    )


def _said(said: Any, *, part: bool) -> Iterator[Feature]:
    """The features that messages, or parts of a message, ask for at any depth. The parser has bounded the depth."""
    for item in _items(said):
        if isinstance(item, list):
            yield from _said(item, part=part)
        elif isinstance(item, dict):
            kind = str(item.get("type") or "")
            given = [kind, *(key for key, value in item.items() if value is not None)]
            if "prompt_embeds" in given:
                yield Feature.PROMPT_EMBEDS
            elif (part and kind not in _TEXT_PARTS) or any(_MEDIA.search(name) for name in given):
                yield Feature.MEDIA
            for name in _HOLDS_PARTS:
                yield from _said(item.get(name), part=True)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else []
