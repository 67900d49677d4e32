"""The baseline over HTTP, on a real server with two engines."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.shapes.roofline import decode_ceiling
from pat_serve.shapes.sizes import ModelSizes
from tests.integration.asking import check_error, post
from tests.integration.conftest import HANG_S, Server
from tests.integration.pair.conftest import MAX_MODEL_LEN, PROMPT, running_pair

pytestmark = pytest.mark.vllm

SMALL = {"prompt_tokens": 16, "output_tokens": 9, "rounds": 5}


def test_baseline_answers_as_the_dense_model(dense: Path, client: httpx.Client) -> None:
    encoded = AutoTokenizer.from_pretrained(dense)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    generated = model.generate(**encoded, max_new_tokens=24, do_sample=False)
    expected = generated[0, encoded["input_ids"].shape[1] :].tolist()
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    answer = client.post("/baseline/generate", json=body).raise_for_status().json()
    assert (answer["token_ids"], answer["model"]) == (expected, str(dense))
    assert answer["timings"]["queue_s"] is not None
    assert client.post("/generate", json=body).json()["token_ids"] != expected


def test_a_conversation_goes_through_each_models_template(dense: Path, server: Server, client: httpx.Client) -> None:
    talk = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "of"},
        {"role": "user", "content": "?"},
    ]
    settings = {"max_tokens": 12, "temperature": 0}
    for path, folder in (("/generate", server.model), ("/baseline/generate", dense)):
        ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            talk, add_generation_prompt=True, return_dict=False
        )
        told = client.post(path, json={"messages": talk} | settings).raise_for_status().json()
        assert told["usage"]["prompt_tokens"] == len(ids)
        assert told["token_ids"] == client.post(path, json={"prompt_token_ids": ids} | settings).json()["token_ids"]
    long = [{"role": "user", "content": "dict " * MAX_MODEL_LEN}]
    check_error(client.post("/generate", json={"messages": long}), 400, "invalid_request", "messages", "shorten it")
    wrong = {"messages": talk, "prompt": "a"}
    check_error(client.post("/generate", json=wrong), 400, "invalid_request", None, "exactly one of prompt,")
    assert client.get("/page/model").json()["has_chat"] is True


def test_baseline_has_the_same_door(server: Server, client: httpx.Client) -> None:
    assert httpx.post(f"{server.url}/baseline/generate", json={"prompt": "a"}).status_code == 401
    check_error(client.post("/baseline/generate", json={"prompt": ""}), 400, "invalid_request", "prompt", "at least 1")
    # The metrics are the served model's, and still there.
    assert f'model_name="{server.model}"' in client.get("/metrics").text


def test_no_speedup_is_known_before_the_first_check(client: httpx.Client) -> None:
    check_error(client.get("/benchmark/speedup"), 404, "not_found", None, "POST /benchmark/speedup")


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"claim": 0}, "claim", "greater than 0"),
        ({"margin": -0.01}, "margin", "greater than or equal to 0"),
        ({"margin": 0.5}, "margin", "less than 0.5"),
        ({"rounds": 4}, "rounds", "greater than or equal to 5"),
        ({"regimes": ["both"]}, "regimes.0", "'prefill' or 'decode'"),
        ({"output_tokens": 1}, None, "at least 2"),
        ({"prompt_tokens": MAX_MODEL_LEN}, "prompt_tokens", f"{MAX_MODEL_LEN} together"),
        ({"batch_size": 200, "prompt_tokens": 1000}, "batch_size", "tokens at once"),
    ],
)
def test_bad_check_is_one_clear_400(client: httpx.Client, body: dict[str, Any], param: str | None, told: str) -> None:
    check_error(client.post("/benchmark/speedup", json=body), 400, "invalid_request", param, told)


def test_check_is_refused_while_a_user_is_served_by_either_model(server: Server, client: httpx.Client) -> None:
    endless = {"prompt": PROMPT, "max_tokens": MAX_MODEL_LEN - 100, "ignore_eos": True, "stream": True}
    with server.brake.held(), closing(post(server, "/baseline/generate", endless)) as connection:
        assert connection.getresponse().readline().startswith(b"data: ")
        check_error(client.post("/benchmark/speedup", json=SMALL), 409, "busy", None, "1 request of a user")


def test_latency_beside_a_baseline_has_the_ceiling_of_the_speed_up(
    dense: Path, server: Server, client: httpx.Client
) -> None:
    body = {"batch_size": 2, "prompt_tokens": 16, "output_tokens": 8, "rounds": 2, "warmup": 0, "force": True}
    roofline = client.post("/benchmark/latency", json=body).raise_for_status().json()["roofline"]
    shapes = [ModelSizes.of(json.loads((folder / "config.json").read_text())) for folder in (dense, server.model)]
    ceiling = decode_ceiling(*shapes, batch_size=2, context_tokens=20, dtype_bytes=4)
    assert roofline["decode"]["speedup_ceiling"] == pytest.approx(ceiling)
    assert roofline["prefill"]["speedup_ceiling"] > 1


# The last test that has a baseline: it kills it.
def test_a_dead_baseline_ends_no_server(server: Server, client: httpx.Client) -> None:
    _, second = cores(server)
    family = [second, *second.children(recursive=True)]
    second.kill()
    deadline_s = time.monotonic() + HANG_S
    while (answer := client.post("/baseline/generate", json={"prompt": "a", "max_tokens": 1})).status_code != 503:
        assert time.monotonic() < deadline_s, answer.text
    check_error(answer, 503, "baseline_dead", None, "restart the server")
    check_error(client.post("/benchmark/speedup", json=SMALL), 503, "baseline_dead", None, "restart the server")
    assert client.post("/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert client.get("/ready").status_code == 200
    _, left = psutil.wait_procs(family, timeout=HANG_S)
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["served engine", "supervisor", "server"])
def test_nothing_is_left_whoever_is_killed(dense: Path, tmp_path: Path, killed: str) -> None:
    with running_pair(dense, tmp_path) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        victims = {"served engine": cores(server)[0], "supervisor": server.process, "server": family[0]}
        victims[killed].kill()
        assert server.process.wait(HANG_S) != 0
        assert psutil.wait_procs(family, timeout=HANG_S)[1] == []


def cores(server: Server) -> list[psutil.Process]:
    """The served engine's process and the baseline's, which is started after it."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    found = [child for child in family if any("EngineCore" in part for part in child.cmdline())]
    assert len(found) == 2
    return sorted(found, key=lambda child: float(child.create_time()))
