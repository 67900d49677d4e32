"""One line for each request: JSON for machines, or text for people.

A client chooses its path freely, so the path is escaped to printable ASCII: a line stays one line, and steers no
terminal. Everything else in a line has been checked or is our own.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pat_serve.server.http.exchange import Exchange

# A path that is no route's is cut to so many characters. Routes are shorter.
MAX_PATH_CHARS = 256
_DIGITS = 6

logger = logging.getLogger("pat_serve.access")


class LogFormat(StrEnum):
    """The form of a line in the access log."""

    TEXT = "text"
    JSON = "json"


def start_log() -> None:
    """Write the access log to stdout, whatever other logs do there."""
    if logger.handlers:
        return
    # The log has a descriptor of its own, because vLLM may put its process's name before what is written to sys.stdout.
    handler = logging.StreamHandler(os.fdopen(os.dup(1), "w", encoding="ascii", errors="backslashreplace"))
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class AccessLog:
    """The access log of a server.

    Args:
        form: the form of a line.
        quiet: paths whose requests get no line.
    """

    def __init__(self, form: LogFormat, quiet: Collection[str] = ()) -> None:
        self._line: Callable[[dict[str, Any]], str] = json_line if form is LogFormat.JSON else text_line
        self._quiet = frozenset(quiet)

    def write(self, exchange: Exchange) -> None:
        """Write the line of one request."""
        if exchange.path not in self._quiet:
            logger.info(self._line(fields(exchange)))


def fields(exchange: Exchange) -> dict[str, Any]:
    """The fields of a line, in their order: sizes in bytes, times in seconds. A field without a value is left out."""
    known = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": exchange.request_id,
        "key": exchange.key,
        "method": exchange.method,
        "route": exchange.route,
        "path": _escaped(exchange.path) if exchange.path != exchange.route else None,
        "status": exchange.status,
        "error": exchange.error,
        "request_bytes": exchange.request_bytes,
        "response_bytes": exchange.response_bytes,
        "prompt_tokens": exchange.work.prompt_tokens or None,
        "output_tokens": exchange.work.output_tokens if exchange.work.prompt_tokens else None,
        "queue_s": _rounded(exchange.work.queue_s),
        "ttft_s": _rounded(exchange.ttft_s),
        "tpot_s": _rounded(exchange.work.tpot_s),
        "duration_s": _rounded(exchange.duration_s),
    }
    return {name: value for name, value in known.items() if value is not None}


def json_line(line: dict[str, Any]) -> str:
    """The fields as one JSON object."""
    return json.dumps(line, separators=(",", ":"))


def text_line(line: dict[str, Any]) -> str:
    """Time, method, route and status, then the rest as name=value."""
    rest = {name: value for name, value in line.items() if name not in ("time", "method", "route", "status")}
    told = " ".join(f'{name}="{value}"' if name == "path" else f"{name}={value}" for name, value in rest.items())
    return f"{line['time']} {line['method']} {line['route']} {line['status']} {told}"


def _escaped(path: str) -> str:
    """Printable ASCII without quotes or spaces: other characters as Python writes them in a string."""
    cut = path[:MAX_PATH_CHARS]
    plain = "".join(
        character if "!" <= character <= "~" and character not in '"\\' else f"\\x{ord(character):02x}"
        for character in cut
    )
    return plain + ("..." if len(path) > MAX_PATH_CHARS else "")


def _rounded(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s, _DIGITS)
