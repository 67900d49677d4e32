"""JSON as its authors must have meant it. A document that two parsers could read differently is an error.

Python takes the last of two equal keys, and other parsers take the first. A header with such keys deceives one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def parse(text: str | bytes) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: the text is no JSON or no UTF-8, holds a key twice, NaN or infinity, or is nested without end.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested without end") from error


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"the key {key!r:.80} twice")
        document[key] = value
    return document


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"the number {name}")
