"""What a tokenizer puts around a text by itself: the one rule for the ids that are trained on, evaluated and served.

A server sends `tokenizer(prompt)`. Whether that begins with a BOS token is the tokenizer's habit, not the question
whether it names one: GPT-2's, Qwen's and SmolLM2's name a BOS token and put none before a text, Llama's and Gemma's do.
A chat is another matter: its template writes every special token, and nothing is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pat_serve.errors import BrokenCheckpoint

# Texts whose ids are looked for among those with special tokens around them.
_PROBES = ("a", "0", ".")


@dataclass(frozen=True, kw_only=True)
class TokenHabit:
    """What a tokenizer adds to a text.

    Attributes:
        start: ids before it.
        start_text: the same as text, as somebody would type it.
        end: ids after it. It ends a server's prompts too, so a tokenizer for generation has none.
    """

    start: tuple[int, ...]
    start_text: str
    end: tuple[int, ...]


def token_habit(tokenizer: Any) -> TokenHabit:
    """The habit of a Hugging Face tokenizer, seen from what it does.

    Raises:
        BrokenCheckpoint: special tokens change the ids of the text between them.
    """
    for probe in _PROBES:
        text = tokenizer.encode(probe, add_special_tokens=False)
        whole = tokenizer.encode(probe, add_special_tokens=True)
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


def text_ids(tokenizer: Any, text: str, habit: TokenHabit) -> list[int]:
    """Ids of a prompt that is plain text: what a server sends for it.

    A start that somebody typed (`<s>[INST] ...`) is the start, and not a second one.
    """
    bare: list[int] = tokenizer.encode(text.removeprefix(habit.start_text), add_special_tokens=False)
    return [*habit.start, *bare]
