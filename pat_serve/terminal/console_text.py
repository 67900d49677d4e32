"""Write signs that a console cannot show in signs that it can, so that no finished work ends in an encoding error."""

from __future__ import annotations

import codecs
import io
import sys

# Plus-minus, multiplication sign, en dash, em dash, minus, arrow, less or equal, greater or equal, ellipsis, dot.
_PLAIN = {
    0xB1: "+/-", 0xD7: "x", 0x2013: "-", 0x2014: "-", 0x2212: "-", 0x2192: "->", 0x2264: "<=", 0x2265: ">=",
    0x2026: "...", 0xB7: ".",
}  # fmt: skip


def replace_unknown(error: UnicodeError) -> tuple[str, int]:
    """Error handler for `str.encode`: a plain sign where there is one, or else the number as JSON writes it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = []
    for sign in error.object[error.start : error.end]:
        units = sign.encode("utf-16-be", "surrogatepass").hex()
        numbers = "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
        plain = sign.translate(_PLAIN)
        written.append(plain if plain != sign else numbers)
    return "".join(written), error.end


def use_plain_signs() -> None:
    """Make stdout and stderr write plain signs for all that their encoding lacks, also in names that are no text."""
    codecs.register_error("plain", replace_unknown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
