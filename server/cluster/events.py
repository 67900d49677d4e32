"""A stream of server-sent events may break off: whole events are handed on, and the last event says what happened."""

from __future__ import annotations

from collections.abc import Iterable

from pat_serve.server.http.errors import HttpError

_END = b"\n\n"
Headers = Iterable[tuple[bytes, bytes]]


class WholeEvents:
    """Cuts a stream of bytes after each event, so that an event that breaks off in the middle does no harm."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """The events that are complete by now."""
        data = self._rest + chunk
        end = data.rfind(_END)
        end = 0 if end < 0 else end + len(_END)
        self._rest = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """The bytes after the last whole event."""
        rest, self._rest = self._rest, b""
        return rest


def is_event_stream(headers: Headers) -> bool:
    """Whether an answer is a stream of events."""
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def error_event(error: HttpError) -> bytes:
    """An error as the last event of a stream, in the shape of an error's body."""
    return f"data: {error.body().model_dump_json()}".encode() + _END
