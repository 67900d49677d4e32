"""Documents become passages, and a passage becomes a row that `pat-train --data` reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# About 400 tokens of English: a passage fills most of a row of 512.
PASSAGE_CHARACTERS = 1_600
LEAST_CHARACTERS = 120
_PROMPT_WORDS = 6
# Something has to be left to complete. A word is taken whole (++), or a long one would be parted in every way there is.
_FIRST_WORDS = re.compile(rf"\s*+(?: *+[^ ]++){{1,{_PROMPT_WORDS}}}(?=\s+\S)|\s*+\S++(?=\s+\S)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text that is trained on or held out as a whole.

    Attributes:
        source: name of the source that it is from.
        name: tells it from the source's others, the same on every machine.
        paragraphs: its text in order.
        join: text between two paragraphs.
    """

    source: str
    name: str
    paragraphs: tuple[str, ...]
    join: str = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A piece of a document."""

    source: str
    document: str
    text: str


def draw(*parts: str) -> float:
    """A number in [0, 1) that the parts alone decide: the same on every machine and in every order."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def passages_of(document: Document) -> Iterator[Passage]:
    """Join a document's paragraphs to passages of at most PASSAGE_CHARACTERS, unless one sentence is longer.

    Passages below LEAST_CHARACTERS are left out.
    """
    for text in _joined(_short(document.paragraphs), document.join):
        if len(text) >= LEAST_CHARACTERS:
            yield Passage(source=document.source, document=document.name, text=text)


def row_of(text: str) -> dict[str, str]:
    """The first words prompt the rest, so that nearly every token counts in the loss."""
    # Line feeds stay where they are: only blanks part the prompt from the completion. Blanks that indent are no words.
    begun = _FIRST_WORDS.match(text)
    end = begun.end() if begun else len(text) - len(text.lstrip()) // 2
    return {"prompt": text[:end], "completion": text[end:]}


def _joined(paragraphs: Iterable[str], join: str) -> Iterator[str]:
    parts: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if parts and length + len(join) + len(paragraph) > PASSAGE_CHARACTERS:
            yield join.join(parts)
            parts, length = [], 0
        length += len(paragraph) + (len(join) if parts else 0)
        parts.append(paragraph)
    if parts:
        yield join.join(parts)


def _short(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs that fit into a passage; a longer one is parted between sentences."""
    for paragraph in paragraphs:
        if len(paragraph) <= PASSAGE_CHARACTERS:
            yield paragraph
        else:
            yield from _joined(_SENTENCE_END.split(paragraph), " ")
