"""The benchmarks over a running engine: rounds of one batch (latency), and a steady number of clients (throughput).

Prompts are random token ids from a seeded generator and generation ignores the end of sequence, so every request costs
the same and a run can be repeated. Keys and values of equal earlier prompts are not reused: prefill is measured too.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from pat_serve.server.engine.generation import RequestTimes, Sampling, TimedGeneration, TokenEngine


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The lengths and the vocabulary of every request of a benchmark."""

    prompt_tokens: int
    output_tokens: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """The timed requests of a benchmark, in the order of their arrival, and its start and end.

    Times are on the server's monotonic clock, in seconds.
    """

    start_s: float
    end_s: float
    requests: tuple[RequestTimes, ...]

    @property
    def duration_s(self) -> float:
        """Time from the first request's arrival until the last token."""
        return self.end_s - self.start_s

    @property
    def output_tokens(self) -> int:
        """Tokens that all requests together generated."""
        return sum(times.output_tokens for times in self.requests)

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens over the whole duration."""
        return self.output_tokens / self.duration_s

    @property
    def requests_per_s(self) -> float:
        """Finished requests over the whole duration."""
        return len(self.requests) / self.duration_s


class Prompts:
    """Random prompts of one shape. The same seed gives the same prompts, in the order in which they are asked for.

    Args:
        seed: of the generator.
        shape: of every request.
    """

    def __init__(self, seed: int, shape: Shape) -> None:
        self._generator = random.Random(seed)
        self._shape = shape
        self._turn = asyncio.Lock()

    async def draw(self, count: int) -> list[list[int]]:
        """Make so many prompts, off the event loop: a large batch takes seconds, and the loop has others to serve."""
        async with self._turn:
            return await asyncio.to_thread(lambda: [self._one() for _ in range(count)])

    def _one(self) -> list[int]:
        return [self._generator.randrange(self._shape.vocab_size) for _ in range(self._shape.prompt_tokens)]


def benchmark_request(engine: TokenEngine, prompt: Sequence[int], output_tokens: int) -> TimedGeneration:
    """A request of a benchmark, made now: greedy, of exactly so many tokens, which no cache answers."""
    sampling = Sampling(
        max_tokens=output_tokens, temperature=0.0, ignore_eos=True, read_prefix_cache=False, detokenize=False
    )
    return TimedGeneration(engine, prompt, sampling)


async def _measure_request(engine: TokenEngine, prompt: Sequence[int], output_tokens: int) -> RequestTimes:
    return await benchmark_request(engine, prompt, output_tokens).run()


async def measure_latency(
    engine: TokenEngine,
    shape: Shape,
    *,
    batch_size: int,
    rounds: int,
    warmup: int,
    seed: int,
) -> list[Run]:
    """Send a batch, wait until all its requests have finished, and send the next.

    Returns:
        one `Run` for each timed round; `warmup` rounds before them are left out.
    """
    source = Prompts(seed, shape)
    runs = []
    for _ in range(warmup + rounds):
        prompts = await source.draw(batch_size)
        requests = [_measure_request(engine, prompt, shape.output_tokens) for prompt in prompts]
        runs.append(_run(await together(requests)))
    return runs[warmup:]


async def measure_throughput(
    engine: TokenEngine,
    shape: Shape,
    *,
    concurrency: int,
    num_requests: int | None,
    duration_s: float | None,
    warmup: int,
    seed: int,
) -> Run:
    """Keep `concurrency` requests under way until enough have been sent or the time is over, and wait for the last.

    Args:
        num_requests: timed requests in all; exactly one of this and `duration_s` is given.
        duration_s: seconds after which no request is started but the first.
        warmup: untimed rounds of `concurrency` requests before.
    """
    source = Prompts(seed, shape)
    for _ in range(warmup):
        prompts = await source.draw(concurrency)
        await together([_measure_request(engine, prompt, shape.output_tokens) for prompt in prompts])

    finished: list[RequestTimes] = []
    started = 0
    deadline_s = None if duration_s is None else time.monotonic() + duration_s

    async def client() -> None:
        nonlocal started
        while (num_requests is None or started < num_requests) and (
            deadline_s is None or not started or time.monotonic() < deadline_s
        ):
            started += 1
            [prompt] = await source.draw(1)
            finished.append(await _measure_request(engine, prompt, shape.output_tokens))

    await together([client() for _ in range(concurrency)])
    return _run(finished)


def _run(requests: Sequence[RequestTimes]) -> Run:
    ordered = sorted(requests, key=lambda times: times.arrival_s)
    return Run(start_s=ordered[0].arrival_s, end_s=max(times.end_s for times in ordered), requests=tuple(ordered))


async def together(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run all work at once, and give all results; the first failure cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]
