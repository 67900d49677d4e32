"""Bodies that no honest client sends, to the real engine: refused as documented, and the next request is served."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.integration.conftest import Server

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("serves_afterwards")]

SECRET = "zzSECRETzz"
GENERATING = ["/generate", "/v1/completions"]


BROKEN = {
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "1e999": b'{"prompt": "a", "temperature": 1e999}',
    "NUL byte": b'{"prompt": "a\x00"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate bytes": b'{"prompt": "\xed\xa0\x80"}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "1,000 deep": b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "100,000 deep": b"[" * 100_000,
    "a text without an end": b"[" * 50_001 + b'"' + b'\\"' * 400_000,
    "5,000 digits": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "not an object": b"[1, 2]",
    "empty": b"",
    "two": b"{}{}",
    "10k wrong items": b'{"prompt": [' + b", ".join([b'{"a": "' + SECRET.encode() + b'"}'] * 10_000) + b"]}",
    "10k wrong ids": b'{"prompt_token_ids": [' + b", ".join([b'"' + SECRET.encode() + b'"'] * 10_000) + b"]}",
    "10k wrong messages": b'{"messages": [' + b", ".join([b'"' + SECRET.encode() + b'"'] * 10_000) + b"]}",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("path", [*GENERATING, "/v1/chat/completions", "/v1/responses", "/tokenize", "/invocations"])
def test_broken_bodies(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 1000
    assert SECRET not in answer.text
    assert "/" + "site-packages" not in answer.text


WRONG: list[dict[str, Any]] = [
    {"n": 10**9},
    {"n": "1000000000"},
    {"max_tokens": 10**9},
    {"max_tokens": -1},
    {"stop": ["x"] * 10_000},
    {"stop": ["x" * 10_000]},
    {"stop": [""]},
    {"logprobs": -1},
    {"logprobs": 10**6},
    {"prompt_logprobs": -1},
    {"temperature": -1},
    {"temperature": SECRET},
    {"top_p": 2},
    {"seed": 2**70},
    {"logit_bias": {"1000000": 1}},
    {"prompt": {"a": SECRET}},
    {"prompt": [-1]},
    {"prompt": [384]},
    {"prompt": [2**70]},
    {"prompt": [[5], [384]]},
    {"prompt": "a", "request_id": "a\r\nInjected: 1"},
    {"prompt": "a", "request_id": "a" * 10**6},
    {"prompt_embeds": "AAAA"},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"regex": "(a|aa)+$"}},
    {"min_tokens": 10**9},
    {"truncate_prompt_tokens": 10**9},
    {"best_of": 10**9},
    {"allowed_token_ids": list(range(2000))},
]


@pytest.mark.parametrize("wrong", WRONG, ids=[" ".join(json.dumps(wrong)[:40].split()) for wrong in WRONG])
def test_wrong_completions(server: Server, client: httpx.Client, wrong: dict[str, Any]) -> None:
    body = {"model": str(server.model), "prompt": "a", "max_tokens": 4} | wrong
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 1000
    assert SECRET not in answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("wrong", [{"prompt_token_ids": [-1]}, {"prompt_token_ids": [384]}, {"stop": ["x"] * 10_000}])
def test_wrong_generate(client: httpx.Client, wrong: dict[str, Any]) -> None:
    body = {"prompt": "a"} if "stop" in wrong else {}
    answer = client.post("/generate", json=body | wrong)
    assert answer.status_code == 400
    assert len(answer.text) < 1000


@pytest.mark.parametrize(
    "wrong",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}
            ]
        },
        {"chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}"},
        {"tool_choice": "required"},
        {"top_logprobs": 10**6, "logprobs": True},
        {"kv_transfer_params": {"remote_host": "127.0.0.1", "remote_port": 9}},
    ],
    ids=["media", "template", "tool", "top_logprobs", "transfer"],
)
def test_wrong_chat(server: Server, client: httpx.Client, wrong: dict[str, Any]) -> None:
    body = {"model": str(server.model), "messages": [{"role": "user", "content": "a"}]} | wrong
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert next(iter(wrong)) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"system": [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/"}}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [
            {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/"}}]}]}]},
    ],
    ids=["output_config", "system", "tool_result"],
)  # fmt: skip
def test_wrong_messages(server: Server, client: httpx.Client, wrong: dict[str, Any]) -> None:
    body = {"model": str(server.model), "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}
    assert client.post("/v1/messages", json=body | {"tool_choice": {"type": "none"}}).status_code == 200
    answer = client.post("/v1/messages", json=body | wrong)
    assert answer.status_code == 400
    assert f"{next(iter(wrong))}: " in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    ["/scale_elastic_ep", "/inference/v1/abort_requests", "/v1/completions/render", "/adapters", "/kv_event_sources"],
)
def test_routes_that_steer_the_engine_are_not_there(client: httpx.Client, path: str) -> None:
    assert client.post(path, json={}).status_code == 404
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/generative_scoring", "/v1/systemone"])
def test_routes_whose_sequences_nobody_counts_are_not_there(client: httpx.Client, path: str) -> None:
    body = {"query": "a", "items": ["b"] * 20_000, "label_token_ids": [5]}
    assert client.post(path, json=body).status_code == 404


def test_an_unknown_field_with_a_long_name(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "a", SECRET + "a" * 100_000: 1})
    assert answer.status_code == 400
    assert len(answer.text) < 1000
    assert SECRET not in answer.text


def test_more_sequences_than_the_server_holds(server: Server, client: httpx.Client) -> None:
    body = {"model": str(server.model), "prompt": ["a"] * 5, "n": 4, "max_tokens": 2}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "20 sequences" in answer.json()["error"]["message"]
