"""The time from the first signal until the engine may go: requests under way finish, and no new request begins."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time

from pat_serve.server.http.admission import Admission

logger = logging.getLogger(__name__)

_POLL_S = 0.05


class Drain:
    """The drain of a server. The object is made on the event loop; `wait` is called once, from another thread.

    Args:
        admission: counts the requests under way.
        grace_s: time in seconds that these requests may take.
    """

    def __init__(self, admission: Admission, *, grace_s: float) -> None:
        self._admission = admission
        self._grace_s = grace_s
        self._loop = asyncio.get_running_loop()
        self._hurry = threading.Event()
        self._parent = os.getppid()

    def wait(self) -> None:
        """Refuse new requests, and return when no request is under way, the time is over, or a second signal came."""
        self._admission.draining = True
        # vLLM's own handlers take the first signal and ignore all others.
        self._loop.call_soon_threadsafe(self._listen)
        deadline_s = time.monotonic() + self._grace_s
        while self._admission.unfinished and time.monotonic() < deadline_s and os.getppid() == self._parent:
            if self._hurry.wait(_POLL_S):
                break
        if self._admission.unfinished:
            logger.warning("requests that are cut off: %d", self._admission.unfinished)

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._hurry.set)
