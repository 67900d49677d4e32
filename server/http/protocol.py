"""uvicorn's HTTP protocol, with bounds on a connection before a request is complete and after its answer.

uvicorn hands a request on when its headers are complete, so nothing behind it sees headers that never end, a connection
on which nothing happens, or a client that does not read. The parser is httptools, as in vLLM. uvicorn's other parser,
h11, bounds the headers' size, but costs more time than all the rest of the front.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Any, cast
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.policy import MAX_HEADER_BYTES, MAX_HEADERS, Policy

# A refused client may still be sending. If its connection were closed at once, it would see a reset in place of the
# answer.
_LINGER_S = 2.0
# Seconds between the last request and the end of the process. The server does not wait for answers that nobody reads.
CONNECTIONS_END_S = 4


def bounded_protocol(
    policy: Policy, *, guarded: Callable[[], bool], refused: Callable[[HttpError], None] = lambda error: None
) -> type[HttpToolsProtocol]:
    """The protocol class for a policy: uvicorn makes the instances.

    Args:
        policy: bounds of a connection.
        guarded: whether the app behind it has its `Front`. vLLM goes on without a plugin that it cannot load, and would
            serve with neither keys nor bounds: no connection is taken then.
        refused: is called with each refusal that the app never hears of.
    """
    settings = {"policy": policy, "guarded": staticmethod(guarded), "refused": staticmethod(refused)}
    return type("BoundedProtocol", (_BoundedProtocol,), settings)


class _BoundedProtocol(HttpToolsProtocol):
    policy: Policy
    guarded: Callable[[], bool]
    refused: Callable[[HttpError], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_headers = False
        self._in_body = False
        # While a body comes, this counts the bytes since its last piece: trailers and chunks' extensions.
        self._header_bytes = 0
        self._trailers = 0
        self._refused = False
        self._receive_timer: TimerHandle | None = None
        self._send_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock of the first request."""
        # The signature is asyncio's own. uvicorn's names the kind that a server's connections are.
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self.policy.max_connections or not self.guarded():
            self.connections.discard(self)
            self._refused = True
            self.transport.abort()
            return
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks of the connection."""
        self._stop_timer("_receive_timer")
        self._stop_timer("_send_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes that belong to no body."""
        if self._refused:
            return
        begun = self._in_headers or self._in_body
        if begun:
            # A piece of a body among the data sets this to 0.
            self._header_bytes += len(data)
        super().data_received(data)
        if not begun and self._in_headers:
            # The parser does not say where in the data the headers begin, so bytes that are pipelined behind a body may
            # count as theirs.
            self._header_bytes = len(data)
        reading = self._in_headers or self._in_body
        if reading and (self._header_bytes > MAX_HEADER_BYTES or self._trailers > MAX_HEADERS):
            told = f"at most {MAX_HEADERS} headers or trailers of {MAX_HEADER_BYTES} bytes together are allowed"
            self._refuse(HttpError(431, "headers_too_large", told))
        elif not self._in_headers and (self.cycle is None or self.cycle.response_complete):
            # Empty lines between requests stop uvicorn's keep-alive clock and begin no request.
            self._await_request()

    def on_message_begin(self) -> None:
        """Begin a request, whose headers have a time to arrive in."""
        super().on_message_begin()
        self._in_headers = True
        self._trailers = 0
        self._await_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; count a trailer, and drop it: the headers have been checked, and nothing of ours reads one."""
        if self._in_headers:
            super().on_header(name, value)
        else:
            self._trailers += 1

    def on_headers_complete(self) -> None:
        """End the headers; from here on the body's reader keeps the time."""
        self._in_headers = False
        self._in_body = True
        self._header_bytes = 0
        self._stop_timer("_receive_timer")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body of a request."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP."""
        self.refused(HttpError(400, "not_http", msg))
        self._write(400, b"text/plain; charset=utf-8", msg.encode())
        self.transport.close()

    def shutdown(self) -> None:
        """Stop serving this connection, and cut it off when its time is over.

        A request that is cut off ends as if its client had left. uvicorn would cancel the request, and log that with a
        traceback.
        """
        super().shutdown()
        self.loop.call_later(CONNECTIONS_END_S, self.transport.abort)

    def pause_writing(self) -> None:
        """Start the clock of a client that has stopped reading, or is slower than the answer."""
        super().pause_writing()
        self._start_send_timer()

    def resume_writing(self) -> None:
        """Stop the clock of a client that reads again."""
        super().resume_writing()
        self._stop_timer("_send_timer")

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also one whose client has not read the end of its last answer."""
        super().timeout_keep_alive_handler()
        self._start_send_timer()

    def _await_request(self) -> None:
        if self._receive_timer is None and self.transport is not None and not self.transport.is_closing():
            self._receive_timer = self.loop.call_later(self.policy.receive_timeout_s, self._headers_late)

    def _headers_late(self) -> None:
        self._receive_timer = None
        if not self._in_headers:
            self.transport.close()
            return
        self._refuse(HttpError(408, "headers_timeout", f"headers took over {self.policy.receive_timeout_s:g} s"))

    def _refuse(self, error: HttpError) -> None:
        """Answer without an app, and throw away what still comes."""
        self._refused = True
        self._stop_timer("_receive_timer")
        self.refused(error)
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            begun = self.cycle.response_started
            # The app sees its client leave, and nothing that it still says is sent.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if begun:
                self.transport.abort()
                return
        self._write(error.status, b"application/json", error.body().model_dump_json().encode())
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def _write(self, status: int, kind: bytes, body: bytes) -> None:
        """Write the last answer of a connection, which no app gives."""
        fields = b"content-type: %b\r\ncontent-length: %d\r\n" % (kind, len(body))
        # The client's own request id may be the reason for the refusal, so the answer has an id of ours.
        fields += b"x-request-id: %b\r\nconnection: close\r\n\r\n" % uuid4().hex.encode()
        self.transport.write(STATUS_LINE[status] + fields + body)

    def _start_send_timer(self) -> None:
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self.policy.send_timeout_s, self.transport.abort)

    def _stop_timer(self, name: str) -> None:
        timer: TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
