"""A closed connection stops the work that is done for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pat_serve.server.http.errors import ClientGoneError

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work for as long as the client waits for it.

    The request's body must have been read: the messages that follow it are consumed here.

    Raises:
        ClientGoneError: the client left; the work has been cancelled and has finished.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events from an async generator, which is closed for certain when the client leaves."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        # Proxies must hand on each event at once.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and close their generator afterwards."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Starlette cancels the sending when the client leaves. A generator that is between two events does not see
            # that.
            await self._events.aclose()
