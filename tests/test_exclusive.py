"""The benchmarks' turn, with an admission that counts real requests and no engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import Request

from pat_serve.server.http.admission import Admission
from pat_serve.server.http.errors import HttpError
from pat_serve.server.routes.exclusive import Exclusive


async def _never() -> Any:
    await asyncio.sleep(3600)


REQUEST = Request({"type": "http", "method": "POST", "headers": []}, receive=_never)


class Server:
    """Admits requests as the front does."""

    def __init__(self) -> None:
        self.admission = Admission(capacity=9)
        self.exclusive = Exclusive(self.admission)

    async def benchmark(self, work: Any, *, sequences: int = 1, force: bool = False) -> tuple[Any, int]:
        with self.admission.admit("none", 1):
            return await self.exclusive.run(REQUEST, work, sequences=sequences, force=force)

    async def user(self, duration_s: float) -> None:
        with self.admission.admit("none", 1):
            await asyncio.sleep(duration_s)


def test_users_are_counted_and_benchmarks_are_not() -> None:
    async def work(server: Server) -> str:
        with pytest.raises(HttpError, match="another benchmark"):
            await server.benchmark(_never())
        await server.user(0)
        await server.user(0)
        return "done"

    async def check() -> None:
        server = Server()
        assert await server.benchmark(asyncio.sleep(0, "quiet")) == ("quiet", 0)
        assert await server.benchmark(work(server)) == ("done", 2)
        # Neither those that were refused nor those that have gone are still counted.
        assert await server.benchmark(asyncio.sleep(0, "quiet")) == ("quiet", 0)

    asyncio.run(check())


def test_a_served_user_refuses_it_unless_forced() -> None:
    async def check() -> None:
        server = Server()
        user = asyncio.create_task(server.user(3600))
        await asyncio.sleep(0)
        with pytest.raises(HttpError) as caught:
            await server.benchmark(_never())
        assert (caught.value.status, caught.value.kind) == (409, "busy")
        assert '"force": true' in caught.value.message
        assert await server.benchmark(asyncio.sleep(0, 1), force=True) == (1, 1)
        user.cancel()

    asyncio.run(check())


def test_a_failed_benchmark_leaves_room_for_the_next() -> None:
    async def fail() -> None:
        raise HttpError(503, "engine_dead", "dead")

    async def check() -> None:
        server = Server()
        with pytest.raises(HttpError, match="dead"):
            await server.benchmark(fail())
        assert await server.benchmark(asyncio.sleep(0, 1)) == (1, 0)

    asyncio.run(check())


def test_its_sequences_wait_in_the_queue_like_a_users() -> None:
    async def check() -> None:
        server = Server()

        async def work() -> int:
            assert server.exclusive.running
            return server.admission.sequences

        assert await server.benchmark(work(), sequences=9) == (9, 0)
        with server.admission.admit("none", 1):
            for sequences, status in ((9, 503), (10, 400)):
                with pytest.raises(HttpError) as caught:
                    await server.benchmark(work(), sequences=sequences, force=True)
                assert caught.value.status == status
        assert not server.exclusive.running
        assert (server.admission.sequences, server.admission.requests) == (0, 0)

    asyncio.run(check())
