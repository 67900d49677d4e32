"""POST /benchmark/latency and /benchmark/throughput of a running server."""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import Any

import httpx
import pytest

from pat_serve.shapes.roofline import prefill_flops
from pat_serve.shapes.sizes import ModelSizes, decode_bytes
from tests.integration.asking import check_error, post
from tests.integration.conftest import HANG_S, MAX_MODEL_LEN, Server, metric, wait_for
from tests.integration.test_server import PROMPT, check_timings

pytestmark = pytest.mark.vllm


def test_benchmark_latency(server: Server, client: httpx.Client) -> None:
    body = {"batch_size": 2, "prompt_tokens": 16, "output_tokens": 8, "rounds": 3, "warmup": 1}
    before = metric(client, "vllm:generation_tokens_total")
    response = client.post("/benchmark/latency", json=body).raise_for_status()
    answer = response.json()
    assert metric(client, "vllm:generation_tokens_total") - before == 4 * 2 * 8
    assert answer["settings"] == body | {"seed": 0, "force": False}
    assert answer["other_requests"] == 0
    assert len(answer["rounds"]) == 3
    for round_ in answer["rounds"]:
        assert [request["output_tokens"] for request in round_["requests"]] == [8, 8]
        assert round_["output_tokens_per_s"] == pytest.approx(16 / round_["duration_s"])
        assert round_["duration_s"] >= max(request["e2e_s"] for request in round_["requests"])
        for request in round_["requests"]:
            check_timings({key: request[key] for key in ("queue_s", "ttft_s", "tpot_s", "e2e_s")}, response)
    ttfts = sorted(request["ttft_s"] for round_ in answer["rounds"] for request in round_["requests"])
    summary = answer["summary"]
    assert summary["ttft_s"]["count"] == 6
    assert summary["ttft_s"]["median"] == pytest.approx((ttfts[2] + ttfts[3]) / 2)
    assert summary["tpot_s"]["p50"] <= summary["tpot_s"]["p90"] <= summary["tpot_s"]["p99"]
    assert summary["output_tokens_per_s"]["count"] == 3
    for figures in (summary["ttft_s"], summary["tpot_s"], summary["e2e_s"], summary["output_tokens_per_s"]):
        assert figures["min"] <= figures["median_low"] <= figures["median"] <= figures["median_high"] <= figures["max"]
    roofline = answer["roofline"]
    shape = ModelSizes.of(json.loads((server.model / "config.json").read_text()))
    read = decode_bytes(shape, batch_size=2, context_tokens=20, dtype_bytes=4)
    assert (roofline["dtype"], roofline["decode"]["bytes_per_step"]) == ("float32", read)
    assert roofline["decode"]["achieved_bytes_per_s"] == pytest.approx(read / summary["tpot_s"]["median"])
    assert roofline["prefill"]["flops"] == prefill_flops(shape, batch_size=2, prompt_tokens=16)
    assert roofline["prefill"]["speedup_ceiling"] is roofline["decode"]["speedup_ceiling"] is None


def test_benchmark_throughput_by_number(client: httpx.Client) -> None:
    body = {"concurrency": 3, "num_requests": 7, "prompt_tokens": 16, "output_tokens": 4, "warmup": 0}
    answer = client.post("/benchmark/throughput", json=body).raise_for_status().json()
    assert [request["output_tokens"] for request in answer["requests"]] == [4] * 7
    summary = answer["summary"]
    assert summary["requests_per_s"] == pytest.approx(7 / answer["duration_s"])
    assert summary["output_tokens_per_s"] == pytest.approx(28 / answer["duration_s"])
    assert summary["total_tokens_per_s"] == pytest.approx(7 * 20 / answer["duration_s"])
    starts = [request["start_s"] for request in answer["requests"]]
    ends = [request["start_s"] + request["e2e_s"] for request in answer["requests"]]
    # Never more than three under way: the fourth starts when the first has ended.
    assert all(start >= sorted(ends)[index - 3] for index, start in enumerate(starts) if index >= 3)


def test_benchmark_throughput_by_time(client: httpx.Client) -> None:
    body = {"duration_s": 2.0, "concurrency": 2, "prompt_tokens": 8, "output_tokens": 4}
    answer = client.post("/benchmark/throughput", json=body).raise_for_status().json()
    # The last request starts within the time, and is waited for.
    assert max(request["start_s"] for request in answer["requests"]) < 2.0 <= answer["duration_s"]


def test_benchmark_throughput_of_no_time_is_one_request(client: httpx.Client) -> None:
    body = {"duration_s": 5e-324, "concurrency": 3, "prompt_tokens": 8, "output_tokens": 4, "warmup": 0}
    assert len(client.post("/benchmark/throughput", json=body).raise_for_status().json()["requests"]) == 1


def test_second_benchmark_is_refused_until_the_first_ones_client_leaves(server: Server, client: httpx.Client) -> None:
    endless = {"rounds": 100, "prompt_tokens": 8, "output_tokens": 1000}
    short = {"rounds": 1, "warmup": 0, "prompt_tokens": 8, "output_tokens": 2}
    with server.brake.held():
        with closing(post(server, "/benchmark/latency", endless)):
            wait_for(client, "vllm:num_requests_running", 1)
            refused = client.post("/benchmark/latency", json=short)
            check_error(refused, 409, "busy", None, "another benchmark is running")
        wait_for(client, "vllm:num_requests_running", 0)
    deadline_s = time.monotonic() + HANG_S
    while client.post("/benchmark/latency", json=short).status_code == 409:
        assert time.monotonic() < deadline_s, "the benchmark runs on"


def test_benchmark_waits_for_no_user_unless_forced(server: Server, client: httpx.Client) -> None:
    short = {"num_requests": 1, "warmup": 0, "prompt_tokens": 8, "output_tokens": 2}
    endless = {"prompt": PROMPT, "max_tokens": MAX_MODEL_LEN - 100, "ignore_eos": True}
    with closing(post(server, "/generate", endless)), server.brake.held():
        wait_for(client, "vllm:num_requests_running", 1)
        refused = client.post("/benchmark/throughput", json=short)
        check_error(refused, 409, "busy", None, '1 request of a user is under way.*"force": true')
        forced = client.post("/benchmark/throughput", json=short | {"force": True}).raise_for_status().json()
        assert forced["other_requests"] == 1
    wait_for(client, "vllm:num_requests_running", 0)


@pytest.mark.parametrize(
    ("path", "body", "param", "told"),
    [
        ("latency", {"batch_size": 0}, "batch_size", "greater than or equal to 1"),
        ("latency", {"rounds": 101}, "rounds", "less than or equal to 100"),
        ("latency", {"prompt_tokens": MAX_MODEL_LEN}, "prompt_tokens", f"{MAX_MODEL_LEN + 64} together"),
        ("latency", {"batch_size": 17}, None, "17 sequences .*holds 16"),
        ("throughput", {"concurrency": 256, "num_requests": 1, "force": True}, None, "256 sequences"),
        ("throughput", {}, None, "exactly one of num_requests and duration_s"),
        ("throughput", {"duration_s": 601}, "duration_s", "less than or equal to 600"),
        ("throughput", {"num_requests": 1, "users": 2}, None, "an unknown field"),
    ],
)
def test_bad_benchmark_is_one_clear_400(
    client: httpx.Client, path: str, body: dict[str, Any], param: str | None, told: str
) -> None:
    check_error(client.post(f"/benchmark/{path}", json=body), 400, "invalid_request", param, told)
