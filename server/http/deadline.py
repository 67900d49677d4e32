"""The time that an answer may take: 504 before it has begun, an error event in a stream."""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pat_serve.server.http.errors import HttpError

# Seconds that the app has to notice that its client, as the app sees it, has gone.
_END_S = 5.0


async def within_deadline(app: ASGIApp, scope: Scope, receive: Receive, send: Send, timeout_s: float) -> None:
    """Run the app; when the time is over, answer in its place and let it see a client that left.

    A cancelled task would not do: vLLM's routes run their work in tasks of their own, which only a disconnect ends.
    """
    await _Deadline(timeout_s, receive, send).run(app, scope)


class _Deadline:
    # Timers are cheaper than tasks that race. Every request passes here, and most requests never come near their
    # deadline.

    def __init__(self, timeout_s: float, receive: Receive, send: Send) -> None:
        self._timeout_s = timeout_s
        self._receive = receive
        self._send = send
        self._expired = False
        self._answer: asyncio.Task[None] | None = None
        self._waiting: set[asyncio.Timeout] = set()
        self._start: Message | None = None
        self._complete = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        loop = asyncio.get_running_loop()
        failure: Exception | None = None
        try:
            async with asyncio.timeout(None) as limit:
                timer = loop.call_later(self._timeout_s, self._expire, scope, limit)
                try:
                    await app(scope, self.receive, self.send)
                finally:
                    timer.cancel()
                    self._complete = True
        except Exception as error:
            if not (isinstance(error, TimeoutError) and limit.expired()):
                failure = error
        if self._answer is not None:
            # The app may end at once, while our end of the answer still waits for a client that reads slowly; one that
            # stops reading is cut off by the protocol, and then this ends too.
            await asyncio.wait({self._answer})
        if failure is not None:
            raise failure

    async def receive(self) -> Message:
        """The connection's next message, or a disconnect once the time is over."""
        if not self._expired:
            try:
                async with asyncio.timeout(None) as waiting:
                    self._waiting.add(waiting)
                    try:
                        return await self._receive()
                    finally:
                        self._waiting.discard(waiting)
            except TimeoutError:
                if not waiting.expired():
                    raise
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass an answer's part on, unless ours has taken its place."""
        if self._expired:
            return
        if message["type"] == "http.response.start":
            self._start = message
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    def _expire(self, scope: Scope, limit: asyncio.Timeout) -> None:
        """End the request's time: the app sees its client leave, and the client gets our end of the answer."""
        if self._complete:
            return
        self._expired = True
        loop = asyncio.get_running_loop()
        for waiting in self._waiting:
            waiting.reschedule(loop.time())
        self._answer = loop.create_task(self._answer_late(scope))
        self._answer.add_done_callback(lambda _: None if self._complete else limit.reschedule(loop.time() + _END_S))

    async def _answer_late(self, scope: Scope) -> None:
        error = HttpError(504, "deadline", f"the answer took longer than {self._timeout_s:g} s and was stopped")
        if self._start is None:
            await error.response()(scope, self._receive, self._send)
            return
        # The status line is out. A stream can still tell the error in an event; another body can only be cut off.
        headers = dict(self._start.get("headers", []))
        streaming = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        event = f"data: {json.dumps(error.body().model_dump())}\n\ndata: [DONE]\n\n" if streaming else ""
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
