"""Clients that leave, do not read, or come all at once, to the real engine: its places are free again afterwards."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import (
    HANG_S,
    KEY,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    MAX_QUEUE,
    Server,
    metric,
    wait_for,
    wait_until,
)
from tests.integration.raw_http import RawClient

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("serves_afterwards")]

LONG: dict[str, Any] = {"prompt_token_ids": [5], "max_tokens": MAX_MODEL_LEN - 10, "ignore_eos": True}
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
    with server.brake.held(), ExitStack() as running:
        for _ in range(MAX_NUM_SEQS):
            running.enter_context(RawClient(server)).post(path, long_body(server, path, stream=stream))
        wait_for(client, "vllm:num_requests_running", MAX_NUM_SEQS)
        with RawClient(server) as queued:
            queued.post(path, long_body(server, path, stream=stream))
            wait_for(client, "vllm:num_requests_waiting", 1)
        waited_s = wait_for(client, "vllm:num_requests_waiting", 0)
        assert metric(client, "vllm:num_requests_running") == MAX_NUM_SEQS
        running.close()
        stopped_s = wait_for(client, "vllm:num_requests_running", 0)
    print(f"left while queued: {waited_s:.2f} s, while decoding: {stopped_s:.2f} s")


@pytest.mark.parametrize("path", GENERATING)
def test_a_client_that_leaves_in_prefill(server: Server, client: httpx.Client, path: str) -> None:
    before = metric(client, "vllm:generation_tokens_total")
    ids = "prompt_token_ids" if path == "/generate" else "prompt"
    # Several steps long.
    body = long_body(server, path, stream=True) | {ids: list(range(5, 105)) * 100, "max_tokens": 5000}
    with server.brake.held(pace_s=1):
        with RawClient(server) as raw:
            raw.post(path, body)
            wait_for(client, "vllm:num_requests_running", 1)
        wait_for(client, "vllm:num_requests_running", 0)
    wait_for(client, "vllm:num_requests_waiting", 0)
    # The engine was not held for so long that it could have made them all.
    assert metric(client, "vllm:generation_tokens_total") - before < 5000


def test_a_reader_that_stops_reading_is_cut_off(server: Server, client: httpx.Client) -> None:
    # Logprobs, so that the answer soon fills the buffers on its way.
    body = long_body(server, "/v1/completions", stream=True, logprobs=20)
    whole = client.post("/v1/completions", json=body | {"max_tokens": 8})
    before = metric(client, "vllm:generation_tokens_total")
    # At most the kernel's buffer of the server's end of the connection, and a quarter for all others.
    buffer_bytes = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    filling = 5 * buffer_bytes // 4 * 8 // len(whole.content)
    assert filling < LONG["max_tokens"] - 1000, "the answer fits into the buffers"
    # By then it waits for its reader, and the engine is held until the server's patience is over.
    with server.brake.held(after_steps=filling), RawClient(server, receive_buffer=4096) as raw:
        raw.post("/v1/completions", body)
        wait_until(client, "vllm:generation_tokens_total", lambda made: made > before)
        wait_for(client, "vllm:num_requests_running", 0)
    made = metric(client, "vllm:generation_tokens_total") - before
    assert made < LONG["max_tokens"], "it was served to its end"


def test_a_burst_at_ten_times_the_queue(server: Server, client: httpx.Client) -> None:
    held, asked = MAX_NUM_SEQS + MAX_QUEUE, 10 * MAX_QUEUE

    async def burst() -> tuple[list[httpx.Response], list[httpx.Response]]:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, limits=limits, headers=headers, timeout=HANG_S) as many:
            body = {"prompt": "a", "ignore_eos": True, "max_tokens": 100}
            calls = []
            # No place becomes free before all have come.
            with server.brake.held(pace_s=60):
                for _ in range(asked // 2):
                    calls += [
                        asyncio.create_task(many.post("/generate", json=body)),
                        asyncio.create_task(many.post("/v1/completions", json=body | {"model": str(server.model)})),
                    ]
                ended = asyncio.as_completed(calls)
                first = [await next(ended) for _ in range(asked - held)]
            return first, [await answer for answer in ended]

    refused, served = asyncio.run(burst())
    for answer in refused:
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in served] == [200] * held
    wait_for(client, "vllm:num_requests_waiting", 0)


def test_a_held_engine_takes_the_steps_that_it_is_allowed_and_no_more(server: Server, client: httpx.Client) -> None:
    """All that the tests above build on."""
    before = metric(client, "vllm:generation_tokens_total")
    with RawClient(server) as raw:
        with server.brake.held(after_steps=10, pace_s=HANG_S):
            raw.post("/generate", LONG | {"max_tokens": 50})
            # A step in advance may be under way.
            wait_until(client, "vllm:generation_tokens_total", lambda made: before + 9 <= made)
            assert metric(client, "vllm:generation_tokens_total") <= before + 10
            assert metric(client, "vllm:num_requests_running") == 1
        wait_for(client, "vllm:generation_tokens_total", before + 50)


def test_key_value_memory_that_runs_out(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vllm:num_preemptions_total")

    # Three fit when they begin, and do not when they end.
    prompts = [[first, *range(5, 369)] * 18 for first in (5, 6, 7)]
    bodies = [{"prompt_token_ids": ids, "max_tokens": 700, "ignore_eos": True} for ids in prompts]
    with ThreadPoolExecutor() as threads:
        with server.brake.held():
            calls = [threads.submit(client.post, "/generate", json=body) for body in bodies]
            wait_for(client, "vllm:num_requests_running", 3)
        answers = [call.result() for call in calls]
    for answer in answers:
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 700
    assert metric(client, "vllm:num_preemptions_total") > before
    wait_for(client, "vllm:kv_cache_usage_perc", 0)
