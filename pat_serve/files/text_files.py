"""Text files of users. They are UTF-8, with or without the byte-order mark that some editors put before the text."""

from __future__ import annotations

import codecs
from pathlib import Path

_OTHERS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


class OtherEncodingError(ValueError):
    """The file says that it is of another encoding than UTF-8."""


def read_utf8(path: Path) -> str:
    """Read a file's text without its byte-order mark; line ends become line feeds.

    Raises:
        OSError: the file cannot be read.
        OtherEncodingError: the file begins with the mark of UTF-16 or UTF-32.
        UnicodeDecodeError: the file is no UTF-8.
    """
    with path.open("rb") as file:
        start = file.read(4)
    for name, marks in _OTHERS.items():
        if start.startswith(marks):
            raise OtherEncodingError(f"a file in {name}, by its byte-order mark")
    return path.read_text(encoding="utf-8-sig")


def read_lines(path: Path) -> list[str]:
    """Read a file's lines without the byte-order marks that some begin with where files were joined.

    Line feeds alone part lines: JSON and prose may hold the other signs that Python's `splitlines` takes for ends.

    Raises:
        OSError, OtherEncodingError, UnicodeDecodeError: as `read_utf8`.
    """
    return [line.removeprefix("\ufeff") for line in read_utf8(path).split("\n")]
