"""Errors that an engine gives in place of tokens, as they leave the server."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from pat_serve.server.engine import errors
from pat_serve.server.engine.errors import EngineFault
from pat_serve.server.http.errors import ErrorShapeRoute, answer_to

FAULTS = {
    errors.RequestRefused("seed: too large", "seed"): (400, "invalid_request", None),
    errors.BaselineMissing(): (409, "no_baseline", None),
    errors.GenerationFailed(): (500, "generation_failed", None),
    errors.EngineOverloaded("busy"): (503, "overloaded", "1"),
    errors.EngineDead(): (503, "engine_dead", "1"),
    errors.BaselineDead(): (503, "baseline_dead", None),
    errors.NotReady("the engine has stopped"): (503, "not_ready", None),
}


def test_every_fault_has_an_answer() -> None:
    assert {type(fault) for fault in FAULTS} == set(EngineFault.__subclasses__())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_route_of_ours_answers_for_its_engine(fault: EngineFault) -> None:
    router = APIRouter(route_class=ErrorShapeRoute)

    @router.get("/")
    async def fail() -> None:
        raise fault

    async def ask() -> httpx.Response:
        app = FastAPI()
        app.include_router(router)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/")

    status, kind, retry_after = FAULTS[fault]
    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry_after)
    assert answer.json() == {"error": {"type": kind, "message": fault.message, "param": fault.param}}
    # In a stream the same body is an event.
    assert json.loads(answer_to(fault).body().model_dump_json()) == answer.json()
