"""Answers of vLLM's own routes when its engine dies under a request: its real routers and handlers, and no engine."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from pat_serve.server.cluster.repeat import may_repeat, says_gone
from pat_serve.server.engine.patches import engine_faults, let_engine_errors_through
from pat_serve.server.http.errors import shape_vllm_errors

pytestmark = pytest.mark.vllm

SAID = [{"role": "user", "content": "a"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "model": "m"},
    "/v1/chat/completions": {"messages": SAID, "model": "m"},
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": SAID},
    "/v1/messages/count_tokens": {"model": "m", "messages": SAID},
}


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back everything that a server changes of vLLM."""
    from vllm.entrypoints.anthropic import api_router

    monkeypatch.setattr(api_router, "create_error_response", api_router.create_error_response)


class Failing:
    """Stand in for vLLM's handlers of requests: every call raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, _: str) -> Any:
        async def call(*_: Any, **__: Any) -> None:
            raise self.error

        return call


async def answer(path: str, error: Exception) -> tuple[httpx.Response, bool]:
    """The route's answer, and whether vLLM's server ends."""
    from vllm.entrypoints.anthropic import api_router as messages
    from vllm.entrypoints.openai.chat_completion import api_router as chat
    from vllm.entrypoints.openai.completion import api_router as completion
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    init_exception_handler(app)
    for routes in (messages, chat, completion):
        routes.attach_router(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.server = SimpleNamespace(should_exit=False)
    app.state.engine_client = SimpleNamespace(errored=True, is_running=False)
    app.state.enable_server_load_tracking = False
    for name in ("anthropic_serving_messages", "openai_serving_completion", "openai_serving_chat"):
        setattr(app.state, name, Failing(error))
    let_engine_errors_through()
    shape_vllm_errors(app, engine_faults())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.post(path, json=BODIES[path]), app.state.server.should_exit


@pytest.mark.parametrize("path", BODIES)
def test_a_dead_engine_is_503_and_may_be_asked_of_another(path: str):
    from vllm.v1.engine.exceptions import EngineDeadError

    told, ends = asyncio.run(answer(path, EngineDeadError()))
    assert (told.status_code, told.json()["error"]["type"], ends) == (503, "engine_dead", True)
    assert int(told.headers["Retry-After"]) > 0
    assert may_repeat("POST", path)
    assert says_gone(told.status_code, told.content)


@pytest.mark.parametrize("path", BODIES)
def test_a_failed_generation_is_500_without_its_text(path: str):
    from vllm.v1.engine.exceptions import EngineGenerateError

    told, _ = asyncio.run(answer(path, EngineGenerateError("inner words")))
    assert (told.status_code, told.json()["error"]["type"]) == (500, "generation_failed")
    assert "inner words" not in told.text


def test_what_else_goes_wrong_with_a_message_is_vllms_to_answer():
    told, ends = asyncio.run(answer("/v1/messages", ValueError("no such thing")))
    assert (told.status_code, ends) == (400, False)
    assert told.json()["error"]["message"] == "no such thing"


@pytest.mark.parametrize(("error", "logged"), [(ValueError("no such tool"), False), (RuntimeError("a defect"), True)])
def test_only_a_clients_mistake_leaves_no_traceback_in_the_log(error: Exception, logged: bool):
    from vllm.entrypoints.anthropic import api_router

    records: list[logging.LogRecord] = []
    listener, logger = logging.Handler(), logging.getLogger(api_router.__name__)
    listener.emit = records.append
    logger.addHandler(listener)
    try:
        asyncio.run(answer("/v1/messages", error))
    finally:
        logger.removeHandler(listener)
    assert bool(records) == logged
