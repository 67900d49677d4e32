"""Clients that leave, do not read, or come all at once, to the real engine: its places are free again afterwards."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.integration.conftest import KEY, MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_QUEUE, Server, metric, wait_for
from tests.integration.raw_http import RawClient

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("serves_afterwards")]

LONG = {"prompt_token_ids": [5], "max_tokens": MAX_MODEL_LEN - 10, "ignore_eos": True}
GENERATING = ["/generate", "/v1/completions"]


def long_body(server: Server, path: str, *, stream: bool, **more: Any) -> dict[str, Any]:
    if path == "/generate":
        return LONG | {"stream": stream} | more
    return {
        "model": str(server.model),
        "prompt": [5],
        "max_tokens": MAX_MODEL_LEN - 10,
        "ignore_eos": True,
        "stream": stream,
    } | more


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", GENERATING)
def test_a_client_that_leaves_frees_its_place(server: Server, client: httpx.Client, path: str, stream: bool) -> None:
    with ExitStack() as running:
        for _ in range(MAX_NUM_SEQS):
            running.enter_context(RawClient(server)).post(path, long_body(server, path, stream=stream))
        wait_for(client, "vllm:num_requests_running", MAX_NUM_SEQS)
        with RawClient(server) as queued:
            queued.post(path, long_body(server, path, stream=stream))
            wait_for(client, "vllm:num_requests_waiting", 1)
        waited_s = wait_for(client, "vllm:num_requests_waiting", 0)
    stopped_s = wait_for(client, "vllm:num_requests_running", 0)
    print(f"left while queued: {waited_s:.2f} s, while decoding: {stopped_s:.2f} s")


def test_a_client_that_leaves_in_prefill(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vllm:generation_tokens_total")
    for path in GENERATING:
        with RawClient(server) as raw:
            ids = "prompt_token_ids" if path == "/generate" else "prompt"
            raw.post(path, long_body(server, path, stream=True) | {ids: list(range(5, 105)) * 100, "max_tokens": 5000})
    wait_for(client, "vllm:num_requests_running", 0)
    wait_for(client, "vllm:num_requests_waiting", 0)
    assert metric(client, "vllm:generation_tokens_total") - before < 10_000


def test_a_reader_that_stops_reading_is_cut_off(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vllm:generation_tokens_total")
    with RawClient(server, receive_buffer=4096) as raw:
        # Logprobs, so that the answer soon fills the buffers on its way.
        raw.post("/v1/completions", long_body(server, "/v1/completions", stream=True, logprobs=5))
        wait_for(client, "vllm:num_requests_running", 1)
        wait_for(client, "vllm:num_requests_running", 0, within_s=180)
        made = metric(client, "vllm:generation_tokens_total") - before
        assert made < MAX_MODEL_LEN - 10, "it was served to its end"


def test_a_burst_at_ten_times_the_queue(server: Server, client: httpx.Client) -> None:
    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, limits=limits, headers=headers, timeout=300) as many:
            body = {"ignore_eos": True, "max_tokens": 100}
            ours = {"prompt": "a"} | body
            theirs = {"prompt": "a", "model": str(server.model)} | body
            calls = [many.post("/generate", json=ours), many.post("/v1/completions", json=theirs)]
            for _ in range(5 * MAX_QUEUE - 1):
                calls += [many.post("/generate", json=ours), many.post("/v1/completions", json=theirs)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(burst())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= MAX_NUM_SEQS + MAX_QUEUE
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["type"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    wait_for(client, "vllm:num_requests_waiting", 0)


def test_key_value_memory_that_runs_out(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vllm:num_preemptions_total")

    async def fill() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300) as many:
            # Three fit when they begin, and do not when they end.
            prompts = [[first, *range(5, 369)] * 18 for first in (5, 6, 7)]
            bodies = [{"prompt_token_ids": ids, "max_tokens": 700, "ignore_eos": True} for ids in prompts]
            return await asyncio.gather(*(many.post("/generate", json=body) for body in bodies))

    for answer in asyncio.run(fill()):
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 700
    assert metric(client, "vllm:num_preemptions_total") > before
    wait_for(client, "vllm:kv_cache_usage_perc", 0)
