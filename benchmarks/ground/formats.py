"""Dictionaries, collections of quotations, and books in HTML, as documents."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser

from benchmarks.ground.passages import Document

# Entries of a dictionary that are held out or trained on together.
_ENTRIES_A_DOCUMENT = 40
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
# GCIDE names the source of every sense, and marks how a headword is spoken.
_SENSE_SOURCE = re.compile(r"\s*\[(?:1913 Webster|PJC|WordNet 1\.5|Century Dict\.[^\]]*|\+?PJC[^\]]*)\]")
_SPOKEN = re.compile(r"\s*\\[^\\\n]{1,60}\\,?")
_BLANKS = re.compile(r"\s+")
# A line that begins with one of these is no prose, and a text with none of these ends is a list.
_PROSE_END = (".", "!", "?", ":", ".)", '."', ".”")
_LEAST_WORDS = 8
_BLOCKS = {"p", "li", "dd", "dt", "td", "th", "tr", "div", "h1", "h2", "h3", "h4", "h5", "h6", "br", "blockquote",
           "title", "item", "section", "note", "desc", "table", "ul", "ol", "dl"}  # fmt: skip
_SKIPPED = {
    "script",
    "style",
    "pre",
    "head",
    "nav",
    "header",
    "footer",
    "code-block",
    "screen",
    "info",
    "programlisting",
}


def dictionary(source: str, index: bytes, packed: bytes) -> Iterator[Document]:
    """Read a dictionary of a dictd server.

    Args:
        source: name of the source.
        index: headword, offset and length a line, both numbers in base 64.
        packed: the entries, gzipped.
    """
    content = gzip.decompress(packed)
    places: dict[int, int] = {}
    for line in index.decode("utf-8", "replace").splitlines():
        head, offset, length = line.split("\t")[:3]
        if not head.startswith("00"):
            # Several headwords may share an entry.
            places.setdefault(_number(offset), _number(length))
    entries = [_entry(content[at : at + places[at]].decode("utf-8", "replace")) for at in sorted(places)]
    for at in range(0, len(entries), _ENTRIES_A_DOCUMENT):
        yield Document(source=source, name=f"entries {at}", paragraphs=tuple(entries[at : at + _ENTRIES_A_DOCUMENT]))


def quotations(source: str, files: Mapping[str, bytes]) -> Iterator[Document]:
    """Read files of quotations, which lines of a percent sign part from each other."""
    for name, content in sorted(files.items()):
        for number, text in enumerate(re.split(r"\n%+\n", content.decode("utf-8", "replace"))):
            yield Document(source=source, name=f"{name} {number}", paragraphs=(text.strip("\n%").rstrip(),))


def books(source: str, files: Mapping[str, bytes]) -> Iterator[Document]:
    """Read a book's pages in HTML, or in another markup of <p>; only whole sentences are taken."""
    for name, content in sorted(files.items()):
        page = _Page()
        page.feed(content.decode("utf-8", "replace"))
        page.close()
        paragraphs = tuple(dict.fromkeys(filter(_is_prose, page.paragraphs())))
        if paragraphs:
            yield Document(source=source, name=name, paragraphs=paragraphs)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def _entry(text: str) -> str:
    text = _SPOKEN.sub("", _SENSE_SOURCE.sub("", text)).replace("{", "").replace("}", "")
    # A sense that is wrapped at 72 columns becomes one line.
    lines: list[str] = []
    for line in text.strip().split("\n"):
        continues = lines and line.startswith(" ") and not re.match(r"\s*(?:[a-z]+ )?\d+[.:]|\s*\([a-z]\)", line)
        if continues and lines[-1] and line.strip() and len(lines) > 1:
            lines[-1] += " " + _BLANKS.sub(" ", line.strip())
        elif line.strip():
            lines.append(_BLANKS.sub(" ", line.strip()))
    return "\n".join(lines)


def _is_prose(text: str) -> bool:
    return text.endswith(_PROSE_END) and len(text.split()) >= _LEAST_WORDS


class _Page(HTMLParser):
    """Collects the text of a page, a paragraph for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._blocks: list[list[str]] = [[]]
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in _SKIPPED
        self._begin(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._begin(tag)

    def handle_endtag(self, tag: str) -> None:
        self._skipping = max(0, self._skipping - (tag in _SKIPPED))
        self._begin(tag)

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._blocks[-1].append(data)

    def paragraphs(self) -> Iterator[str]:
        """Every block's text on one line."""
        return (_BLANKS.sub(" ", "".join(block)).strip() for block in self._blocks)

    def _begin(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._blocks.append([])
