"""The time that an answer may take: 504 before it has begun, an error event in a stream."""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pat_serve.server.http.errors import HttpError

# What the app may take to notice that its client, as it sees it, has gone.
_END_S = 5.0


async def within_deadline(app: ASGIApp, scope: Scope, receive: Receive, send: Send, timeout_s: float) -> None:
    """Run the app; when the time is over, answer in its place and let it see a client that left.

    A cancelled task would not do: vLLM's routes run their work in tasks of their own, which only a disconnect ends.
    """
    await _Deadline(timeout_s, receive, send).run(app, scope)


class _Deadline:
    def __init__(self, timeout_s: float, receive: Receive, send: Send) -> None:
        self._timeout_s = timeout_s
        self._receive = receive
        self._send = send
        self._expired = asyncio.Event()
        self._start: Message | None = None
        self._complete = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        timer = asyncio.create_task(self._expire(scope))
        work = asyncio.ensure_future(app(scope, self.receive, self.send))
        try:
            await asyncio.wait({work, timer}, return_when=asyncio.FIRST_COMPLETED)
            if self._expired.is_set():
                # The work may end at once, while our end of the answer still waits for a client that reads slowly; one
                # that stops reading is cut off by the protocol, and then this ends too.
                await asyncio.wait({timer})
            if not work.done():
                await asyncio.wait({work}, timeout=_END_S)
            if work.done():
                work.result()
        finally:
            timer.cancel()
            work.cancel()
            await asyncio.gather(timer, work, return_exceptions=True)

    async def receive(self) -> Message:
        """The connection's next message, or a disconnect once the time is over."""
        real = asyncio.ensure_future(self._receive())
        expired = asyncio.create_task(self._expired.wait())
        try:
            await asyncio.wait({real, expired}, return_when=asyncio.FIRST_COMPLETED)
            return real.result() if real.done() else {"type": "http.disconnect"}
        finally:
            real.cancel()
            expired.cancel()

    async def send(self, message: Message) -> None:
        """Pass an answer's part on, unless ours has taken its place."""
        if self._expired.is_set():
            return
        if message["type"] == "http.response.start":
            self._start = message
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def _expire(self, scope: Scope) -> None:
        await asyncio.sleep(self._timeout_s)
        if self._complete:
            return
        self._expired.set()
        error = HttpError(504, "deadline", f"the answer took longer than {self._timeout_s:g} s and was stopped")
        if self._start is None:
            await error.response()(scope, self._receive, self._send)
            return
        # The status line is out. In a stream an event can still say it; another body can only be cut off.
        headers = dict(self._start.get("headers", []))
        streaming = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        event = f"data: {json.dumps(error.body().model_dump())}\n\ndata: [DONE]\n\n" if streaming else ""
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
