"""Benchmarks run one at a time, and none runs while users are being served, unless its client insists."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from pat_serve.server.http.admission import Admission
from pat_serve.server.http.connection import while_connected
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.limits import BENCHMARK_TIMEOUT_S

T = TypeVar("T")


class Exclusive:
    """Gives benchmarks their turns. Every benchmark is itself an admitted request of one sequence, which is no user's.

    Args:
        admission: knows the requests under way.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._running = False
        # The number of benchmarks that have come in, refused ones included, and the number of those that are here now.
        self._arrived = self._present = 0

    @property
    def running(self) -> bool:
        """Whether a benchmark has its turn."""
        return self._running

    async def run(self, http: Request, work: Coroutine[Any, Any, T], *, sequences: int, force: bool) -> tuple[T, int]:
        """Do a benchmark's work for as long as its client waits for it.

        Args:
            http: the client's request.
            work: the benchmark's work.
            sequences: sequences that the work has in an engine at once; they take places in the queue like a user's.
            force: run also while users are being served.

        Returns:
            the work's result, and how many requests of users were under way meanwhile or at the start.

        Raises:
            HttpError: 400 more sequences than the queue ever holds; 409 another benchmark runs, or users are being
                served; 503 the queue has no room now, or it took too long.
            ClientGoneError: the client left; the work has ended.
        """
        self._arrived += 1
        self._present += 1
        try:
            users = self._admission.requests - self._present
            if self._running or (users > 0 and not force):
                work.close()
                raise self._busy(users)
            before = self._admission.admitted - self._arrived
            try:
                with self._admission.more(sequences - 1):
                    self._running = True
                    async with asyncio.timeout(BENCHMARK_TIMEOUT_S):
                        result = await while_connected(http, work)
            except TimeoutError:
                message = f"the benchmark took longer than {BENCHMARK_TIMEOUT_S:g} s and was stopped; ask for less"
                raise HttpError(503, "benchmark_timeout", message) from None
            finally:
                self._running = False
                # The work has not begun where the queue had no room.
                work.close()
            return result, users + self._admission.admitted - self._arrived - before
        finally:
            self._present -= 1

    def _busy(self, users: int) -> HttpError:
        if self._running:
            return HttpError(409, "busy", "another benchmark is running; two at once would measure each other")
        are = "1 request of a user is" if users == 1 else f"{users} requests of users are"
        told = f'{are} under way, which the benchmark would slow and be slowed by; send "force": true to run it anyway'
        return HttpError(409, "busy", told)
