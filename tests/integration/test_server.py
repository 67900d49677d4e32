"""Every route of a real server on vLLM's CPU engine."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.server.analysis.roofline import prefill_flops
from pat_serve.server.engine.readiness import FRESH_S
from pat_serve.shapes.sizes import ModelSizes, decode_bytes
from tests.integration.asking import check_error, events, post
from tests.integration.conftest import HANG_S, KEY, MAX_MODEL_LEN, Server, metric, wait_for

pytestmark = pytest.mark.vllm

PROMPT = "Return a new dictionary"


def check_timings(timings: dict[str, float], response: httpx.Response) -> None:
    """Timings are in seconds and within the client's own: httpx stops its clock when it has read all."""
    assert timings.keys() == {"queue_s", "ttft_s", "tpot_s", "e2e_s"}
    seen_s = response.elapsed.total_seconds()
    assert 0 <= timings["queue_s"] < timings["ttft_s"] < timings["e2e_s"] < seen_s
    assert 0 < timings["tpot_s"] < timings["e2e_s"]


def test_generate_equals_transformers_greedily(server: Server, client: httpx.Client) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    model = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32)
    encoded = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**encoded, max_new_tokens=32, do_sample=False)
    expected = generated[0, encoded["input_ids"].shape[1] :].tolist()

    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    answer = client.post("/generate", json=body).raise_for_status().json()
    assert answer["token_ids"] == expected
    assert len(set(expected)) > 4  # a model that repeats one token would prove little

    ids = encoded["input_ids"][0].tolist()
    by_ids = client.post("/generate", json={"prompt_token_ids": ids, "max_tokens": 32, "temperature": 0}).json()
    assert by_ids["token_ids"] == expected


def test_generate_reports_usage_reason_and_timings(server: Server, client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
    response = client.post("/generate", json=body).raise_for_status()
    answer = response.json()
    prompt_tokens = len(AutoTokenizer.from_pretrained(server.model)(PROMPT)["input_ids"])
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 8,
        "total_tokens": prompt_tokens + 8,
    }
    assert len(answer["token_ids"]) == 8
    assert answer["finish_reason"] == "length"
    assert answer["model"] == str(server.model)
    check_timings(answer["timings"], response)


def test_stop_string_ends_and_is_left_out(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    text = client.post("/generate", json=body).json()["text"]
    stop = text[3:5]
    answer = client.post("/generate", json=body | {"stop": stop}).json()
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == text[: text.index(stop)]


def test_seed_repeats_and_matters(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 1.5, "ignore_eos": True}
    answers = [client.post("/generate", json=body | {"seed": seed}).raise_for_status().json() for seed in (7, 7, 8)]
    first, again, other = (answer["token_ids"] for answer in answers)
    assert first == again != other


def test_max_tokens_defaults_to_what_fits(client: httpx.Client) -> None:
    body = {"prompt_token_ids": [5] * (MAX_MODEL_LEN - 3), "ignore_eos": True}
    assert client.post("/generate", json=body).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}])
def test_stream_adds_up_to_the_whole_answer(server: Server, client: httpx.Client, sampling: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True} | sampling
    whole = client.post("/generate", json=body).raise_for_status().json()
    with ExitStack() as stream:
        with server.brake.held(after_steps=3, pace_s=HANG_S):
            response = stream.enter_context(client.stream("POST", "/generate", json=body | {"stream": True}))
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            # It comes while the engine has not made the others.
            first = next(lines)
        *deltas, end = events([first, *lines])
    assert 1 <= len(deltas[0]["token_ids"]) <= 3
    assert "".join(delta["text"] for delta in deltas) == whole["text"]
    assert [token for delta in deltas for token in delta["token_ids"]] == whole["token_ids"]
    assert end["finish_reason"] == whole["finish_reason"] == "length"
    assert end["usage"] == whole["usage"]
    check_timings(end["timings"], response)
    assert {delta["id"] for delta in deltas} == {end["id"]} != {whole["id"]}


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_stops_its_generation(server: Server, client: httpx.Client, stream: bool) -> None:
    asked = MAX_MODEL_LEN - 10
    before = metric(client, "vllm:generation_tokens_total")
    body = {"prompt_token_ids": [5], "max_tokens": asked, "ignore_eos": True, "stream": stream}
    with server.brake.held():
        with closing(post(server, "/generate", body)) as connection:
            if stream:
                assert connection.getresponse().readline().startswith(b"data: ")
            # A stream's first event is here, and the generation goes on.
            wait_for(client, "vllm:num_requests_running", 1)
        wait_for(client, "vllm:num_requests_running", 0)
    # One that had run to its end would have made them all.
    assert 0 <= metric(client, "vllm:generation_tokens_total") - before < asked


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        pytest.param({"prompt": ""}, "prompt", "at least 1 character", id="empty prompt"),
        pytest.param({"prompt_token_ids": []}, "prompt_token_ids", "at least 1 item", id="no token ids"),
        pytest.param({}, None, "exactly one of prompt, prompt_token_ids and messages", id="no prompt"),
        pytest.param(
            {"prompt": "a", "prompt_token_ids": [1]},
            None,
            "exactly one of prompt, prompt_token_ids and messages",
            id="two prompts",
        ),
        pytest.param(
            {"prompt_token_ids": [5] * (MAX_MODEL_LEN + 7)},
            "prompt_token_ids",
            rf"{MAX_MODEL_LEN + 7} tokens.*{MAX_MODEL_LEN}.*--max-model-len",
            id="long token ids",
        ),
        pytest.param(
            {"prompt": "a b " * MAX_MODEL_LEN}, "prompt", rf"\d+ tokens.*{MAX_MODEL_LEN}.*shorten", id="long prompt"
        ),
        pytest.param(
            {"prompt_token_ids": [5] * 10, "max_tokens": MAX_MODEL_LEN},
            "max_tokens",
            rf"{MAX_MODEL_LEN + 10} together.*{MAX_MODEL_LEN}.*lower max_tokens to {MAX_MODEL_LEN - 10}",
            id="prompt and output too long",
        ),
        pytest.param({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1", id="max_tokens 0"),
        pytest.param({"prompt": "a", "max_tokens": "4"}, "max_tokens", "valid integer", id="string for a number"),
        pytest.param({"prompt": "a", "max_tokens": True}, "max_tokens", "valid integer", id="boolean for a number"),
        pytest.param({"prompt": 4}, "prompt", "valid string", id="number for a string"),
        pytest.param({"prompt": "a", "temperature": 2.5}, "temperature", "less than or equal to 2", id="temperature"),
        pytest.param({"prompt": "a", "top_p": 0}, "top_p", "greater than 0", id="top_p"),
        pytest.param({"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0", id="seed"),
        pytest.param({"prompt": "a", "stop": [""]}, "stop.0", "at least 1 character", id="empty stop"),
        pytest.param({"prompt": "a", "n_predict": 3}, None, "an unknown field; .*max_tokens", id="unknown"),
        pytest.param(
            {"prompt_token_ids": [5, 384]}, "prompt_token_ids", "384 at position 1.*0 to 383", id="vocabulary"
        ),
        pytest.param({"prompt_token_ids": [-1]}, "prompt_token_ids.0", "greater than or equal to 0", id="negative id"),
        pytest.param([1, 2], None, "must be a JSON object", id="not an object"),
    ],
)
def test_bad_generate_is_one_clear_400(client: httpx.Client, body: Any, param: str | None, told: str) -> None:
    check_error(client.post("/generate", json=body), 400, "invalid_request", param, told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"prompt": "a"', "not valid JSON.*character 14"),
        (b'{"prompt": "a", "temperature": NaN}', "finite number"),
        (b'{"prompt": "\\ud800"}', "valid string"),
        (b"[" * 100_000, "more than 50000 lists and objects"),
        (b"[" * 40_000, "cannot be read as JSON|not valid JSON|levels"),
        (b"", "a JSON body is needed"),
    ],
    ids=["malformed", "not a number", "lone surrogate", "too many lists", "too deep", "empty"],
)
def test_bad_json_is_one_clear_400(client: httpx.Client, content: bytes, told: str) -> None:
    response = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    check_error(response, 400, "invalid_request", response.json()["error"]["param"], told)


def test_unknown_path_and_method_have_the_same_shape(client: httpx.Client) -> None:
    check_error(client.get("/nothing"), 404, "not_found", None, "no such route")
    check_error(client.get("/generate"), 405, "method_not_allowed", None, "does not take GET")


def test_health_and_ready(server: Server, client: httpx.Client) -> None:
    assert client.get("/health").raise_for_status().json()["status"] == "alive"
    ready = client.get("/ready").raise_for_status().json()
    assert ready["status"] == "ready"
    assert ready["model"] == str(server.model)
    assert 0 <= ready["last_token_age_s"] <= 5


def test_ready_does_not_probe_again_while_tokens_are_fresh(client: httpx.Client) -> None:
    begun_s = time.monotonic()
    client.post("/generate", json={"prompt": PROMPT, "max_tokens": 1}).raise_for_status()
    before = metric(client, "vllm:prompt_tokens_total")
    for _ in range(5):
        client.get("/ready").raise_for_status()
    # A probe has a prompt of one token. None is due before the last token is too old.
    probes = metric(client, "vllm:prompt_tokens_total") - before
    assert probes <= (time.monotonic() - begun_s) // FRESH_S


def test_openai_client(server: Server, client: httpx.Client) -> None:
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    completion = api.completions.create(model=str(server.model), prompt=PROMPT, max_tokens=12, temperature=0)
    ours = client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12, "temperature": 0}).json()
    assert completion.choices[0].text == ours["text"]
    # It was started with a slash behind the folder's name.
    assert [model.id for model in api.models.list()] == [str(server.model), f"{server.model}/"]
    named = api.completions.create(model=f"{server.model}/", prompt=PROMPT, max_tokens=12, temperature=0)
    assert named.choices[0].text == ours["text"]


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/completions", "stop", {"prompt": PROMPT}),
        ("/v1/chat/completions", "stop", {"messages": [{"role": "user", "content": PROMPT}]}),
        ("/v1/messages", "stop_sequences", {"messages": [{"role": "user", "content": PROMPT}]}),
        ("/generate", "stop", {"prompt": PROMPT}),
    ],
)
def test_sixteen_stops_on_every_route(
    path: str, field: str, body: dict[str, Any], server: Server, client: httpx.Client
) -> None:
    asked = body | {"max_tokens": 4} | ({} if path == "/generate" else {"model": str(server.model)})
    stops = [f"stop {number}" for number in range(17)]
    for count in (5, 16):
        answer = client.post(path, json=asked | {field: stops[:count]})
        assert answer.status_code == 200, answer.text
    refused = client.post(path, json=asked | {field: stops})
    assert refused.status_code == 400
    assert "16" in refused.json()["error"]["message"]


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
