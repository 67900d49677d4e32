"""Every route of a real server on vLLM's CPU engine."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.server.engine.readiness import FRESH_S
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
            # The first token comes while the engine has not made the others.
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
    # The server was started with a slash behind the folder's name.
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
