"""Engines that batch continuously behind a dispatcher, simulated event by event. Pure mathematics, no randomness."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pat_serve.server.bench.planning.steps import StepTimes
from pat_serve.server.bench.planning.traffic import Arrival

Dispatch = Literal["least-loaded", "round-robin"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The bounds of an engine.

    Attributes:
        times: seconds of its steps.
        max_batch: requests that it holds at once, at most the largest measured batch.
        max_step_tokens: prompt tokens that one step takes up; a single longer prompt still goes in, whole.
        kv_tokens: tokens that its cache holds; None where only the batch bounds it.
    """

    times: StepTimes
    max_batch: int
    max_step_tokens: int
    kv_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The times of a request's tokens; seconds on the clock of the first arrival."""

    arrival: Arrival
    first_token_s: float
    last_token_s: float

    @property
    def latencies_s(self) -> dict[str, float]:
        """ttft, e2e and, with a second token, tpot."""
        times = {"ttft": self.first_token_s - self.arrival.at_s, "e2e": self.last_token_s - self.arrival.at_s}
        if self.arrival.output_tokens > 1:
            times["tpot"] = (self.last_token_s - self.first_token_s) / (self.arrival.output_tokens - 1)
        return times


class Replica:
    """One engine: first come first served, whole prompts, no preemption.

    A request is taken up when the batch, the step's tokens and the KV cache have room for all of it. The request's
    prompt shares a step with the decode steps of the requests under way.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[tuple[int, Arrival]] = deque()
        # (step in which the last token comes, index, arrival), soonest first.
        self._running: list[tuple[int, int, Arrival]] = []
        self._admitted: list[tuple[int, Arrival]] = []
        self._first_token_s: dict[int, float] = {}
        self._step = 0
        self._clock_s = 0.0
        self._step_ends_s: float | None = None
        # Tokens in the caches of the requests that decode, and tokens reserved by all requests that run.
        self._context, self._reserved = 0, 0
        self.busy_s = 0.0
        self.done: dict[int, Timing] = {}

    @property
    def load(self) -> int:
        """The number of requests that are not done."""
        return len(self._waiting) + len(self._running) + len(self._admitted)

    def push(self, index: int, arrival: Arrival) -> None:
        """Give the replica a request. The replica must have been advanced to the arrival."""
        self._waiting.append((index, arrival))
        if self._step_ends_s is None:
            self._clock_s = max(self._clock_s, arrival.at_s)

    def advance(self, until_s: float) -> None:
        """Do all steps that begin before a time."""
        while True:
            if self._step_ends_s is not None:
                if self._step_ends_s > until_s:
                    return
                self._end_step(self._step_ends_s)
            if not (self._waiting or self._running) or self._clock_s >= until_s:
                return
            self._begin_step()

    def one_step(self) -> float:
        """Do one whole step for the requests that wait and run; returns the time at which it ends."""
        self._begin_step()
        assert self._step_ends_s is not None
        self._end_step(self._step_ends_s)
        return self._clock_s

    def _begin_step(self) -> None:
        engine, tokens = self._engine, 0
        while self._waiting:
            index, arrival = self._waiting[0]
            full = len(self._running) + len(self._admitted) >= engine.max_batch
            long = bool(self._admitted) and tokens + arrival.prompt_tokens > engine.max_step_tokens
            if full or long or (engine.kv_tokens is not None and self._reserved + arrival.tokens > engine.kv_tokens):
                break
            self._waiting.popleft()
            self._admitted.append((index, arrival))
            tokens += arrival.prompt_tokens
            self._reserved += arrival.tokens
        decoding, prompts = len(self._running), len(self._admitted)
        seconds = engine.times.step_s(
            prompts=prompts,
            prompt_tokens=tokens / prompts if prompts else 0.0,
            decoding=decoding,
            context_tokens=self._context / decoding if decoding else 0.0,
        )
        self.busy_s += seconds
        self._step_ends_s = self._clock_s + seconds

    def _end_step(self, now_s: float) -> None:
        self._clock_s, self._step_ends_s = now_s, None
        self._context += len(self._running)
        while self._running and self._running[0][0] == self._step:
            _, index, arrival = heapq.heappop(self._running)
            self._context -= arrival.tokens
            self._finish(index, arrival, now_s)
        for index, arrival in self._admitted:
            self._first_token_s[index] = now_s
            if arrival.output_tokens == 1:
                self._finish(index, arrival, now_s)
            else:
                heapq.heappush(self._running, (self._step + arrival.output_tokens - 1, index, arrival))
                self._context += arrival.prompt_tokens + 1
        self._admitted = []
        self._step += 1

    def _finish(self, index: int, arrival: Arrival, now_s: float) -> None:
        self._reserved -= arrival.tokens
        self.done[index] = Timing(arrival=arrival, first_token_s=self._first_token_s.pop(index), last_token_s=now_s)


def simulate(arrivals: Sequence[Arrival], engine: Engine, *, replicas: int, dispatch: Dispatch) -> list[Timing]:
    """Serve open traffic.

    Args:
        arrivals: in the order of time; each fits into an empty engine.
        engine: each replica.
        replicas: number of them.
        dispatch: a request goes to the replica with the fewest requests that are not done (the first of equals), or to
            each replica in turn.

    Returns:
        a timing for each arrival, in its order.
    """
    engines = [Replica(engine) for _ in range(replicas)]
    for index, arrival in enumerate(arrivals):
        for one in engines:
            one.advance(arrival.at_s)
        in_turn = dispatch == "round-robin"
        chosen = engines[index % replicas] if in_turn else min(engines, key=lambda one: one.load)
        chosen.push(index, arrival)
    for one in engines:
        one.advance(float("inf"))
    timings = {index: timing for one in engines for index, timing in one.done.items()}
    assert len(timings) == len(arrivals)
    return [timings[index] for index in range(len(arrivals))]


def simulate_closed(kinds: Sequence[Arrival], engine: Engine, *, concurrency: int) -> list[Timing]:
    """Keep so many requests in flight on one engine: when one ends, the next is submitted.

    Args:
        kinds: the requests; their arrival times are not used.
        engine: the engine.
        concurrency: in flight.

    Returns:
        a timing for each request, in their order; its arrival is the time at which it was submitted.
    """
    replica, queue, now_s = Replica(engine), deque(enumerate(kinds)), 0.0
    while queue or replica.load:
        while queue and replica.load < concurrency:
            index, kind = queue.popleft()
            replica.push(index, Arrival(at_s=now_s, prompt_tokens=kind.prompt_tokens, output_tokens=kind.output_tokens))
        now_s = replica.one_step()
    return [replica.done[index] for index in range(len(kinds))]
