"""Requests of the live benchmarks, to an engine that answers at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pat_serve.server.routes.measure import Prompts, Shape, measure_latency, measure_throughput

SHAPE = Shape(prompt_tokens=8, output_tokens=1, vocab_size=100)


class Engine:
    """An engine that keeps the prompts."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    async def generate(self, prompt: Sequence[int], sampling: Any) -> AsyncGenerator[Any]:
        self.prompts.append(list(prompt))
        yield SimpleNamespace(token_ids=(1,), engine_times=None)


def latency(seed: int) -> list[list[int]]:
    engine = Engine()
    work = measure_latency(engine, SHAPE, batch_size=3, rounds=2, warmup=1, seed=seed)
    runs = asyncio.run(work)
    assert [len(run.requests) for run in runs] == [3, 3]
    return engine.prompts


def test_prompts_are_repeated_by_their_seed() -> None:
    assert len(latency(0)) == 9
    assert latency(0) == latency(0) != latency(1)


def test_throughput_sends_as_many_as_it_is_told() -> None:
    engine = Engine()
    work = measure_throughput(engine, SHAPE, concurrency=2, num_requests=5, duration_s=None, warmup=1, seed=0)
    run = asyncio.run(work)
    assert len(run.requests) == 5
    assert len({tuple(prompt) for prompt in engine.prompts}) == 7


def test_prompts_are_made_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    make = Prompts._one
    monkeypatch.setattr(Prompts, "_one", lambda self: threads.append(threading.current_thread()) or make(self))
    latency(0)
    assert len(threads) == 9
    assert threading.main_thread() not in threads
