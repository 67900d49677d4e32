"""Tokens and times of a caller's sequences, from what an engine says step by step."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pat_serve.server.engine import token_watch
from pat_serve.server.engine.patches import watch_outputs
from pat_serve.server.engine.token_watch import RequestWork, TokenWatch, current_work


class Engine:
    """Steps at given times, and forgets a request when it ends, as vLLM does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(token_watch.time, "monotonic", lambda: self.now_s)
        self.states: dict[str, Any] = {}
        self.watch = TokenWatch(self.states)

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
def work() -> Iterator[RequestWork]:
    work = RequestWork()
    token = current_work.set(work)
    yield work
    current_work.reset(token)


def test_two_sequences_of_one_request(engine: Engine, work: RequestWork) -> None:
    engine.add("a", prompt_tokens=5)
    engine.add("b")
    engine.step(1.0, ("a", 1, None))
    engine.step(2.0, ("a", 1, None), ("b", 2, None))
    engine.step(4.0, ("a", 1, "stop"), ("b", 1, "length"))
    assert (work.prompt_tokens, work.output_tokens) == (5, 6)
    assert (work.first_token_s, work.queue_s) == (1.0, 0.75)
    # a: two tokens in 3 s; b: one in 2 s after its first two, which came together.
    assert work.tpot_s == pytest.approx(5 / 3)
    assert (len(engine.watch), work.open_sequences) == (0, {})


def test_one_token_alone_has_no_pace(engine: Engine, work: RequestWork) -> None:
    engine.add("a")
    engine.step(1.0, ("a", 1, "length"))
    assert (work.first_token_s, work.queue_s, work.tpot_s) == (1.0, 0.75, None)


def test_what_the_engine_drops_unheard_is_forgotten_with_its_request(engine: Engine, work: RequestWork) -> None:
    engine.add("a")
    engine.add("b")
    engine.step(1.0, ("a", 1, None))
    engine.step(3.0, ("a", 1, None))
    work.close()
    assert len(engine.watch) == 0
    assert (work.output_tokens, work.tpot_s) == (2, 2.0)
    # Nobody owns tokens that still come, nor a request that a surviving task begins.
    engine.step(4.0, ("a", 1, None))
    engine.add("c")
    assert (len(engine.watch), work.output_tokens) == (0, 2)


def test_without_engine_statistics(engine: Engine, work: RequestWork) -> None:
    engine.add("a")
    engine.states["a"] = SimpleNamespace(stats=None)
    engine.watch.process(lambda outputs: None, [SimpleNamespace(request_id="a", new_token_ids=[1], finish_reason=None)])
    assert (work.output_tokens, work.queue_s) == (1, None)


def test_sequences_of_no_request(engine: Engine) -> None:
    engine.add("a")
    assert len(engine.watch) == 0
    engine.step(1.0, ("a", 0, None))
    assert engine.watch.last_token_s is None
    engine.step(2.0, ("a", 1, "stop"))
    # Whoever asked for it, it shows that the engine answers.
    assert engine.watch.last_token_s == 2.0


def test_an_engines_own_methods_are_wrapped(work: RequestWork) -> None:
    class Processor:
        def __init__(self) -> None:
            self.request_states: dict[str, Any] = {}
            self.calls: list[Any] = []

        def add_request(self, *arguments: Any) -> None:
            self.calls.append(arguments)

        def process_outputs(self, outputs: list[Any], timestamp: float) -> float:
            return timestamp

    processor = Processor()
    watch = watch_outputs(processor)
    request = SimpleNamespace(request_id="0_a", prompt_token_ids=[1, 2, 3])
    processor.add_request(request, "text", None, 0, "queue")
    processor.add_request(SimpleNamespace(request_id="1_a", prompt_token_ids=[1, 2, 3]), "text", "parent", 1)
    assert processor.calls == [(request, "text", None, 0, "queue"), (processor.calls[1][0], "text", "parent", 1, None)]
    output = SimpleNamespace(request_id="0_a", new_token_ids=[7], finish_reason=None)
    assert processor.process_outputs([output], 2.5) == 2.5
    assert (work.prompt_tokens, work.output_tokens) == (3, 1)
    assert work.open_sequences.keys() == {"0_a", "1_a"}
    assert watch.last_token_s is not None
