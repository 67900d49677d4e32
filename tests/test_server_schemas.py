"""The HTTP contract's models and the shape of errors, without an engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from pat_serve.server.engine.generation import EngineTimes, RequestTimes
from pat_serve.server.http.errors import explain
from pat_serve.server.http.limits import MAX_MESSAGES, MAX_SEED, MAX_STOPS
from pat_serve.server.routes.benchmark_schemas import LatencyRequest, ThroughputRequest
from pat_serve.server.routes.generate import sse_event
from pat_serve.server.routes.measure import Run
from pat_serve.server.routes.schemas import GenerateRequest, StreamDelta


def refusal(model: type[Any], body: dict[str, Any]) -> Any:
    """The answer to a wrong body, as the route makes it from FastAPI's errors."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return explain(errors, model).body().error


def test_defaults() -> None:
    request = GenerateRequest(prompt="a")
    assert (request.max_tokens, request.temperature, request.top_p, request.top_k) == (None, 1.0, 1.0, 0)
    assert (request.stop, request.seed, request.ignore_eos, request.stream) == ([], None, False, False)


def test_one_stop_string_may_stand_alone() -> None:
    assert GenerateRequest(prompt="a", stop="x").stop == ["x"]  # what JSON may hold
    assert GenerateRequest(prompt="a", stop=["x", "y"]).stop == ["x", "y"]


def test_whole_number_is_a_temperature() -> None:
    assert GenerateRequest.model_validate({"prompt": "a", "temperature": 1}).temperature == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("max_tokens", "1"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("stop", ["x"] * (MAX_STOPS + 1)),
        ("stream", 1),
        ("stream", "true"),
        ("ignore_eos", None),
        ("prompt", ""),
        ("prompt", ["a"]),
    ],
)
def test_wrong_field_is_named(field: str, value: Any) -> None:
    error = refusal(GenerateRequest, {"prompt": "a"} | {field: value})
    assert error.type == "invalid_request"
    assert error.param == field
    assert error.message.startswith(f"{field}: ")


def test_unknown_field_lists_the_known_ones_and_is_not_repeated() -> None:
    error = refusal(GenerateRequest, {"prompt": "a", "max_token_SECRET": 1})
    assert error.message.startswith("an unknown field; known fields are prompt, prompt_token_ids, messages, max_tokens")
    assert error.param is None
    assert "SECRET" not in error.message


@pytest.mark.parametrize(
    ("turn", "param", "told"),
    [
        (
            {"role": "user", "content": "a", "SECRET": 1},
            "messages.1",
            "an unknown field; known fields are role, content",
        ),
        ("SECRET", "messages.1", "must be a JSON object; its fields are role, content"),
        ({"content": "a"}, "messages.1.role", "field required"),
    ],
)
def test_a_turn_is_told_of_a_turns_fields(turn: Any, param: str, told: str) -> None:
    error = refusal(GenerateRequest, {"messages": [{"role": "user", "content": "a"}, turn]})
    assert (error.param, error.message) == (param, f"{param}: {told}")


def test_several_errors_are_one_sentence_that_counts_the_rest() -> None:
    error = refusal(GenerateRequest, {"prompt": "a", "top_p": 2, "seed": "x", "max_tokens": 0})
    assert error.param == "max_tokens"
    assert error.message.endswith("(and 2 more)")


def test_input_is_not_echoed() -> None:
    secret = "correct horse battery staple"
    assert secret not in refusal(GenerateRequest, {"prompt": "a", "seed": secret}).message


TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt": "a", "messages": [TURN]},
        {"prompt_token_ids": [1], "messages": [TURN]},
        {"prompt": "a", "prompt_token_ids": [1], "messages": [TURN]},
    ],
)
def test_exactly_one_prompt(body: dict[str, Any]) -> None:
    error = refusal(GenerateRequest, body)
    assert error.message == "give exactly one of prompt, prompt_token_ids and messages"
    assert error.param is None


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([TURN] * (MAX_MESSAGES + 1), "messages"),
        ([{"content": "a"}], "messages.0.role"),
        ([TURN, {"role": "tool", "content": "a"}], "messages.1.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "messages.0.content"),
        ([TURN | {"name": "me"}], "messages.0"),
    ],
)
def test_wrong_turn_is_named(messages: Any, param: str | None) -> None:
    error = refusal(GenerateRequest, {"messages": messages})
    assert (error.type, error.param) == ("invalid_request", param)


def test_the_document_says_that_one_of_three_is_given() -> None:
    choices = GenerateRequest.model_json_schema()["oneOf"]
    assert [choice["required"] for choice in choices] == [["prompt"], ["prompt_token_ids"], ["messages"]]
    assert [len(choice["properties"]) for choice in choices] == [3, 3, 3]


@pytest.mark.parametrize("body", [{}, {"num_requests": 1, "duration_s": 1.0}])
def test_exactly_one_length_of_a_throughput_run(body: dict[str, Any]) -> None:
    assert refusal(ThroughputRequest, body).message == "give exactly one of num_requests and duration_s"


@pytest.mark.parametrize("field", ["batch_size", "prompt_tokens", "output_tokens", "rounds", "warmup"])
def test_benchmark_is_bounded_on_both_sides(field: str) -> None:
    for value in (-1, 10**9):
        assert refusal(LatencyRequest, {field: value}).param == field


def times(**changes: Any) -> RequestTimes:
    given = {"arrival_s": 10.0, "first_token_s": 10.5, "end_s": 12.5, "output_tokens": 5, "engine": None}
    return RequestTimes(**(given | changes))


def test_latencies_from_the_servers_clock() -> None:
    assert (times().ttft_s, times().tpot_s, times().e2e_s, times().queue_s) == (0.5, 0.5, 2.5, None)


def test_the_engines_clock_wins_for_what_it_sees_better() -> None:
    seen = times(engine=EngineTimes(queue_s=0.125, decode_s=1.0))
    assert (seen.queue_s, seen.tpot_s, seen.ttft_s, seen.e2e_s) == (0.125, 0.25, 0.5, 2.5)


def test_one_token_has_no_time_per_further_token() -> None:
    assert times(output_tokens=1, engine=EngineTimes(queue_s=0.0, decode_s=0.0)).tpot_s is None
    nothing = times(output_tokens=0, first_token_s=None)
    assert (nothing.ttft_s, nothing.tpot_s, nothing.e2e_s) == (None, None, 2.5)


def test_rates_of_a_run() -> None:
    run = Run(start_s=10.0, end_s=14.0, requests=(times(), times(output_tokens=3)))
    assert (run.duration_s, run.output_tokens, run.output_tokens_per_s, run.requests_per_s) == (4.0, 8, 2.0, 0.5)


def test_an_event_is_one_line_to_clients_that_split_text() -> None:
    text = "a\x85b\u2028c\u2029d\x0be\x1cf\r\ng"
    [line] = sse_event(StreamDelta(id="1", text=text, token_ids=[1])).splitlines()[:-1]
    assert json.loads(line.removeprefix("data: "))["text"] == text
