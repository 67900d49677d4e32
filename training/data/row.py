"""One example as text, and what is used of a tokenizer to make and to encode it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token: str | None
    eos_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None
    chat_template: Any

    @property
    def added_tokens_decoder(self) -> Any: ...  # noqa: D102

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102

    @property
    def special_tokens_map(self) -> Any: ...  # noqa: D102

    def get_chat_template(self, *, tools: Any) -> Any: ...  # noqa: D102

    def apply_chat_template(  # noqa: D102
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **arguments: Any
    ) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as text.

    Attributes:
        prompt: what is asked.
        completion: the response.
        chat: the prompt carries its own special tokens.
        ended: the completion carries the end of its turn, so no end of text follows.
        learned: spans of the prompt that count in the loss too: first character, and one past the last.
    """

    prompt: str
    completion: str
    chat: bool = False
    ended: bool = False
    learned: tuple[tuple[int, int], ...] = ()


def without_nulls(value: Any) -> Any:
    """A value without the fields of its objects that are null: tables fill in what an object lacks."""
    if isinstance(value, dict):
        return {name: without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value
