"""Requests made from the server's own OpenAPI document, good ones and broken ones, against the real engine.

Derandomised: a run in CI repeats the last one. `PAT_SERVE_SCHEMATHESIS_EXAMPLES` asks for more of each kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.integration.conftest import HANG_S, KEY, Server

pytestmark = pytest.mark.vllm

EXAMPLES = int(os.environ.get("PAT_SERVE_SCHEMATHESIS_EXAMPLES", "0"))
OURS = [
    ("POST", "/generate", 25),
    ("POST", "/benchmark/latency", 10),
    ("POST", "/benchmark/throughput", 10),
    ("POST", "/benchmark/speedup", 10),
    ("GET", "/benchmark/speedup", 2),
    ("POST", "/baseline/generate", 10),
    ("GET", "/page/model", 2),
    ("GET", "/ready", 2),
    ("GET", "/health", 2),
]
VLLMS = [
    ("POST", "/v1/completions", 10),
    ("POST", "/v1/chat/completions", 6),
    ("POST", "/v1/responses", 4),
    ("POST", "/v1/messages", 5),
    ("POST", "/tokenize", 5),
    ("POST", "/detokenize", 5),
    ("GET", "/v1/models", 2),
    ("GET", "/v1/responses/{response_id}", 5),
    ("POST", "/v1/responses/{response_id}/cancel", 3),
    ("POST", "/v1/chat/completions/batch", 4),
    ("POST", "/v1/messages/count_tokens", 5),
    ("GET", "/version", 2),
    ("GET", "/load", 2),
    ("GET", "/metrics", 2),
    ("GET", "/ping", 2),
    ("POST", "/ping", 2),
    ("POST", "/invocations", 4),
]
# The document says nothing of these that a request could break.
WITHOUT_BODY = {"/v1/responses/{response_id}/cancel", "/ping", "/invocations"}
# This server runs no dense parent.
WITHOUT_BASELINE = {
    ("POST", "/benchmark/speedup"): (409, "no_baseline"),
    ("GET", "/benchmark/speedup"): (404, "not_found"),
    ("POST", "/baseline/generate"): (409, "no_baseline"),
}
# No document can say how many tokens a text has, how many this model takes, or that a field names what another holds.
BY_THE_MODEL = {
    "prompt",
    "prompt_token_ids",
    "prompt_token_ids.0",
    "messages",
    "max_tokens",
    "prompt_tokens",
    "output_tokens",
    "grid",
    "claim_at",
}
# Enough for a route to do all that it does; as a default too where the route's own would take seconds.
LIMIT = {
    "/v1/completions": {"max_tokens": 2}, "/v1/chat/completions": {"max_completion_tokens": 2},
    "/v1/chat/completions/batch": {"max_completion_tokens": 2}, "/invocations": {"max_tokens": 2},
    "/v1/responses": {"max_output_tokens": 2}, "/v1/messages": {"max_tokens": 2},
    "/benchmark/latency": {"rounds": 2, "output_tokens": 2, "prompt_tokens": 4},
    "/benchmark/throughput": {"output_tokens": 2, "prompt_tokens": 4},
}  # fmt: skip
SMALL = {
    "max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "batch_size": 2, "rounds": 2, "warmup": 1,
    "concurrency": 2, "num_requests": 2, "duration_s": 0.1, "prompt_tokens": 4, "output_tokens": 2,
    # FastAPI writes bounds as floats, which have no 2**63 - 1.
    "seed": 2**62,
}  # fmt: skip


@pytest.fixture(scope="module")
def schema(server: Server) -> Iterator[Any]:
    """The server's document; after all tests it has left no trace of them."""
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
    with server.client() as client:
        assert client.post("/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    log = server.log.read_text(errors="replace")
    assert KEY not in log
    assert "Traceback" not in log


def small(path: str, body: Any) -> Any:
    """The same body with numbers that would keep the engine busy for minutes made small."""
    if not isinstance(body, dict):
        return body
    made = LIMIT.get(path, {}) | body
    for name, value in made.items():
        # Five rounds are the least of a check, and none runs here.
        if path != "/benchmark/speedup" and name in SMALL and type(value) in (int, float):
            made[name] = min(value, SMALL[name])
    return plain(made)


def plain(value: Any) -> Any:
    """The same JSON with 7.0 written as 7: to JSON Schema both are integers, to a strict parser one is."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def explore(
    schema: Any, method: str, path: str, mode: GenerationMode, examples: int, check: Callable[..., None]
) -> int:
    """Send requests; returns how many."""
    sent = 0

    @settings(
        max_examples=EXAMPLES or examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        nonlocal sent
        sent += 1
        case.body = small(path, case.body)
        answer = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=HANG_S)
        check(case, answer)

    one()
    return sent


def both_modes(routes: list[tuple[str, str, int]]) -> list[Any]:
    """Good requests to all, broken ones where something of a request is read."""
    return [
        pytest.param(*route, mode, id=f"{route[1]} {mode.value}")
        for route in routes
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if mode is GenerationMode.POSITIVE or ((route[0] == "POST" or "{" in route[1]) and route[1] not in WITHOUT_BODY)
    ]


def test_every_route_that_is_described_is_tried(server: Server) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert described == {(method, path) for method, path, _ in OURS + VLLMS}


@pytest.mark.parametrize(("method", "path", "examples", "mode"), both_modes(OURS))
def test_our_routes_keep_their_promise(
    schema: Any, method: str, path: str, examples: int, mode: GenerationMode
) -> None:
    def check(case: Any, answer: Any) -> None:
        checks = [not_a_server_error, status_code_conformance, content_type_conformance]
        if not answer.headers["content-type"][0].startswith("text/event-stream"):
            checks.append(response_schema_conformance)
        if mode is GenerationMode.NEGATIVE:
            checks.append(negative_data_rejection)
        case.validate_response(answer, checks=checks)
        expected = WITHOUT_BASELINE.get((method, path), (200, None))
        if mode is GenerationMode.POSITIVE and answer.status_code != expected[0]:
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] in BY_THE_MODEL, answer.text
        elif mode is GenerationMode.POSITIVE and expected[1]:
            assert answer.json()["error"]["type"] == expected[1], answer.text

    assert explore(schema, method, path, mode, examples, check) > 0


@pytest.mark.parametrize(("method", "path", "examples", "mode"), both_modes(VLLMS))
def test_vllms_routes_never_fail(schema: Any, method: str, path: str, examples: int, mode: GenerationMode) -> None:
    def check(case: Any, answer: Any) -> None:
        assert answer.status_code in (200, 400, 404, 405), (
            f"{answer.status_code} {answer.text}\n{json.dumps(case.body)}"
        )
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    assert explore(schema, method, path, mode, examples, check) > 0
