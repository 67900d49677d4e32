"""Tokens and times of a request's sequences, from what an engine says step by step."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pat_serve.server.engine import sequence_watch
from pat_serve.server.engine.sequence_watch import SequenceWatch
from pat_serve.server.http.exchange import Exchange, current


class Engine:
    """Steps at given times, and forgets a request when it ends, as vLLM does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(sequence_watch.time, "monotonic", lambda: self.now_s)
        self.states: dict[str, Any] = {}
        self.watch = SequenceWatch(self.states)

    def add(self, request_id: str, prompt_tokens: int = 0) -> None:
        self.states[request_id] = SimpleNamespace(stats=SimpleNamespace(queued_ts=0.0, scheduled_ts=0.0))
        self.watch.add(request_id, prompt_tokens)

    def step(self, now_s: float, *outputs: tuple[str, int, str | None]) -> None:
        def process(outputs: list[Any], iteration: int, *, more: int) -> str:
            for output in outputs:
                state = self.states[output.request_id]
                state.stats.scheduled_ts = state.stats.scheduled_ts or now_s - 0.25
                if output.finish_reason:
                    del self.states[output.request_id]
            return f"{iteration} {more}"

        self.now_s = now_s
        made = [SimpleNamespace(request_id=a, new_token_ids=[7] * b, finish_reason=c) for a, b, c in outputs]
        assert self.watch.process(process, made, 1, more=2) == "1 2"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    exchange = Exchange(method="POST", path="/p", route="/p", request_id="r", arrival_s=0.0)
    token = current.set(exchange)
    yield exchange
    current.reset(token)


def test_two_sequences_of_one_request(engine: Engine, exchange: Exchange) -> None:
    engine.add("a", prompt_tokens=5)
    engine.add("b")
    engine.step(1.0, ("a", 1, None))
    engine.step(2.0, ("a", 1, None), ("b", 2, None))
    engine.step(4.0, ("a", 1, "stop"), ("b", 1, "length"))
    assert (exchange.prompt_tokens, exchange.output_tokens) == (5, 6)
    assert (exchange.ttft_s, exchange.queue_s) == (1.0, 0.75)
    # a: two tokens in 3 s; b: one in 2 s after its first two, which came together.
    assert exchange.tpot_s == pytest.approx(5 / 3)
    assert (len(engine.watch), exchange.open_sequences) == (0, {})


def test_one_token_alone_has_no_pace(engine: Engine, exchange: Exchange) -> None:
    engine.add("a")
    engine.step(1.0, ("a", 1, "length"))
    assert (exchange.ttft_s, exchange.queue_s, exchange.tpot_s) == (1.0, 0.75, None)


def test_what_the_engine_drops_unheard_is_forgotten_with_its_request(engine: Engine, exchange: Exchange) -> None:
    engine.add("a")
    engine.add("b")
    engine.step(1.0, ("a", 1, None))
    engine.step(3.0, ("a", 1, None))
    exchange.close()
    assert len(engine.watch) == 0
    assert (exchange.output_tokens, exchange.tpot_s) == (2, 2.0)
    # What still comes, and what a task that outlives the request begins, is nobody's.
    engine.step(4.0, ("a", 1, None))
    engine.add("c")
    assert (len(engine.watch), exchange.output_tokens) == (0, 2)


def test_without_engine_statistics(engine: Engine, exchange: Exchange) -> None:
    engine.add("a")
    engine.states["a"] = SimpleNamespace(stats=None)
    engine.watch.process(lambda outputs: None, [SimpleNamespace(request_id="a", new_token_ids=[1], finish_reason=None)])
    assert (exchange.output_tokens, exchange.queue_s) == (1, None)


def test_sequences_of_no_request(engine: Engine) -> None:
    engine.add("a")
    assert len(engine.watch) == 0
    engine.step(1.0, ("a", 1, "stop"))


def test_an_engines_own_methods_are_wrapped(exchange: Exchange) -> None:
    class Processor:
        def __init__(self) -> None:
            self.request_states: dict[str, Any] = {}
            self.calls: list[Any] = []

        def add_request(self, *arguments: Any) -> None:
            self.calls.append(arguments)

        def process_outputs(self, outputs: list[Any], timestamp: float) -> float:
            return timestamp

    processor = Processor()
    sequence_watch.watch(processor)
    request = SimpleNamespace(request_id="0_a", prompt_token_ids=[1, 2, 3])
    processor.add_request(request, "text", None, 0, "queue")
    processor.add_request(SimpleNamespace(request_id="1_a", prompt_token_ids=[1, 2, 3]), "text", "parent", 1)
    assert processor.calls == [(request, "text", None, 0, "queue"), (processor.calls[1][0], "text", "parent", 1, None)]
    output = SimpleNamespace(request_id="0_a", new_token_ids=[7], finish_reason=None)
    assert processor.process_outputs([output], 2.5) == 2.5
    assert (exchange.prompt_tokens, exchange.output_tokens) == (3, 1)
    assert exchange.open_sequences.keys() == {"0_a", "1_a"}
