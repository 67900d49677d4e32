"""The tokens that a tokenizer puts around a text by itself: one rule for the ids of training, evaluation and service.

A server sends `tokenizer(prompt)`. The tokenizer's habit decides whether that begins with a BOS token, and not whether
the tokenizer names one: GPT-2's, Qwen's and SmolLM2's name a BOS token and put none before a text, Llama's and Gemma's
put one. In a chat the template writes every special token, and nothing is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pat_serve.errors import BrokenCheckpoint, first_line

# The ids of these texts are looked for among their ids with special tokens around them.
_PROBES = ("a", "0", ".")


@dataclass(frozen=True, kw_only=True)
class TokenHabit:
    """The ids that a tokenizer adds to a text.

    Attributes:
        start: ids before it.
        start_text: the same as text, as somebody would type it.
        end: ids after it. They would end a server's prompts too, so a tokenizer for generation has none.
    """

    start: tuple[int, ...]
    start_text: str
    end: tuple[int, ...]

    def without_start(self, text: str) -> str:
        """A text without the start that somebody typed before it, white space in front of the start included."""
        typed = text.lstrip()
        return typed.removeprefix(self.start_text) if self.start_text and typed.startswith(self.start_text) else text


def token_habit(tokenizer: Any) -> TokenHabit:
    """Find the habit of a Hugging Face tokenizer by trying it.

    Raises:
        BrokenCheckpoint: special tokens change the ids of the text between them, or there are none for a text.
    """
    for probe in _PROBES:
        try:
            text = tokenizer.encode(probe, add_special_tokens=False)
            whole = tokenizer.encode(probe, add_special_tokens=True)
        # The libraries raise bare exceptions.
        except Exception as error:
            raise no_ids(tokenizer, error) from error
        for at in range(len(whole) - len(text) + 1) if text else ():
            if whole[at : at + len(text)] == text:
                start, end = whole[:at], whole[at + len(text) :]
                return TokenHabit(start=tuple(start), start_text=tokenizer.decode(start), end=tuple(end))
    raise BrokenCheckpoint(
        f"the tokenizer {getattr(tokenizer, 'name_or_path', '')}".rstrip(),
        expected="one that puts its special tokens around a text",
        found=f"other ids for {_PROBES[0]!r} with special tokens than without",
        fix="Copy its files from the model's authors again.",
    )


def no_ids(tokenizer: Any, error: Exception) -> BrokenCheckpoint:
    """Make the error of a tokenizer that raises at a text: most often one of whole words without an unknown token."""
    return BrokenCheckpoint(
        f"the tokenizer {getattr(tokenizer, 'name_or_path', '')}".rstrip(),
        expected="one that makes ids of any text",
        found=first_line(error),
        fix="Give it an unknown token or bytes to fall back on, or take the base's own tokenizer.",
    )


def text_ids(tokenizer: Any, text: str, habit: TokenHabit) -> list[int]:
    """Ids of a plain-text prompt, as a server sends them.

    A start that somebody typed (`<s>[INST] ...`) counts as the start, and no second one is added.
    """
    bare: list[int] = tokenizer.encode(habit.without_start(text), add_special_tokens=False)
    return [*habit.start, *bare]
