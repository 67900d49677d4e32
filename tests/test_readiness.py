"""Readiness against engines that misbehave; the real engine's answers are in tests/integration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pat_serve.server.engine import readiness
from pat_serve.server.engine.errors import NotReady
from pat_serve.server.engine.readiness import Readiness


class FakeEngine:
    """Yields pieces as told; no vLLM engine can be made to misbehave on demand."""

    def __init__(self, *pieces: list[int], dead: bool = False, hangs: bool = False) -> None:
        self.pieces, self.dead, self.hangs, self.asked = pieces, dead, hangs, 0
        self.last_token_s: float | None = None

    async def generate(self, prompt: list[int], sampling: Any) -> AsyncIterator[SimpleNamespace]:
        self.asked += 1
        if self.hangs:
            await asyncio.sleep(3600)
        for token_ids in self.pieces:
            # The watch of a real engine's output does the same.
            self.last_token_s = time.monotonic() if token_ids else self.last_token_s
            yield SimpleNamespace(token_ids=token_ids)


def check(engine: FakeEngine) -> float:
    return asyncio.run(Readiness(engine).check())  # the part of Engine that is used


def test_a_token_is_ready() -> None:
    assert check(FakeEngine([7])) < readiness.FRESH_S


@pytest.mark.parametrize("engine", [FakeEngine(), FakeEngine([]), FakeEngine([7], dead=True)])
def test_no_token_is_not_ready(engine: FakeEngine) -> None:
    with pytest.raises(NotReady):
        check(engine)


def test_a_hanging_engine_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "PROBE_TIMEOUT_S", 0.05)
    with pytest.raises(NotReady, match="no token for"):
        check(FakeEngine(hangs=True))


def test_traffic_counts_as_a_probe() -> None:
    engine = FakeEngine([7])
    engine.last_token_s = time.monotonic()
    assert check(engine) < readiness.FRESH_S
    assert engine.asked == 0
    engine.last_token_s = time.monotonic() - readiness.FRESH_S - 1
    check(engine)
    assert engine.asked == 1


def test_an_engine_that_rests_is_not_asked_while_the_other_has_its_turn() -> None:
    engine, other = FakeEngine([7]), FakeEngine([7])
    ready, beside = Readiness(engine), Readiness(other)  # the part of Engine that is used

    async def ask() -> float:
        return await ready.check(beside=beside)

    other.last_token_s = time.monotonic()
    assert asyncio.run(ask()) < readiness.FRESH_S
    assert (engine.asked, other.asked) == (0, 0)
    # When neither has made a token lately, the served one is asked; a dead one is not excused.
    other.last_token_s = time.monotonic() - readiness.FRESH_S - 1
    asyncio.run(ask())
    assert (engine.asked, other.asked) == (1, 0)
    other.last_token_s = time.monotonic()
    engine.dead = True
    with pytest.raises(NotReady):
        asyncio.run(ask())
